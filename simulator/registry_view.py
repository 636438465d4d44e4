"""What the registry of a simulated cluster knows of the workers: their last heartbeats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from core.types import Role, WorkerLoad, WorkerReport
from planner.observation import ObservedWorker


@dataclass(slots=True)
class _Heard:
    report: WorkerReport
    load: WorkerLoad
    at_s: float


class RegistryView:
    """Last reports by worker. A worker that dies stays until its heartbeats have been missed for a while.

    Args:
        gone_after_s: how long a worker may be silent.
    """

    def __init__(self, gone_after_s: float) -> None:
        self._gone_after_s = gone_after_s
        self._heard: dict[str, _Heard] = {}

    def on_report(self, now_s: float, report: WorkerReport) -> None:
        """A heartbeat."""
        self._heard[report.worker_id] = _Heard(report, report.load, now_s)

    def on_load(self, now_s: float, worker_id: str, load: WorkerLoad) -> None:
        """A heartbeat that tells of no event: at most the load is another one."""
        heard = self._heard[worker_id]
        heard.load, heard.at_s = load, now_s

    def leave(self, worker_id: str) -> None:
        """A worker has said that it goes."""
        self._heard.pop(worker_id, None)

    def observed(self, now_s: float, desired: Mapping[str, Role]) -> tuple[ObservedWorker, ...]:
        """Those that count as present.

        Args:
            desired: roles by worker, where they are not the reported ones.
        """
        oldest_s = now_s - self._gone_after_s
        for worker_id in [key for key, heard in self._heard.items() if heard.at_s < oldest_s]:
            del self._heard[worker_id]
        return tuple(
            ObservedWorker(
                report=heard.report if heard.load is heard.report.load else _with_load(heard),
                desired_role=desired.get(worker_id, heard.report.role),
                age_s=now_s - heard.at_s,
            )
            for worker_id, heard in self._heard.items()
        )


def _with_load(heard: _Heard) -> WorkerReport:
    return replace(heard.report, load=heard.load)
