"""Schedules of splits, and how a simulated cluster follows one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from core.types import Role
from simulator.actions import SwitchRole
from simulator.simulation import Simulation
from simulator.worker import SimulatedWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """From then on so many workers shall prefill."""

    start_s: float
    num_prefill: int


Schedule = tuple[Change, ...]
"""In order of time, the first at 0."""


class Rule(StrEnum):
    """Which worker takes another role."""

    FIXED = "in order of ids"
    LEAST_WORK = "least work"


def tidy(changes: Sequence[Change]) -> Schedule:
    """Sorted, from 0 on; of changes at one time the last counts, and those that change nothing go."""
    in_order = sorted(changes, key=lambda change: change.start_s)
    last = {max(0.0, change.start_s): change.num_prefill for change in in_order}
    schedule: list[Change] = []
    for start_s in sorted(last):
        if not schedule or schedule[-1].num_prefill != last[start_s]:
            schedule.append(Change(start_s=start_s if schedule else 0.0, num_prefill=last[start_s]))
    return tuple(schedule)


def switches(schedule: Schedule, shape: str, num_workers: int) -> list[SwitchRole]:
    """By :attr:`Rule.FIXED`: workers with the first ids prefill, those at the border change."""
    actions = []
    for before, now in pairwise(schedule):
        low, high = sorted((before.num_prefill, now.num_prefill))
        assert 0 <= low < high < num_workers, "some worker must decode"
        role = Role.PREFILL if now.num_prefill > before.num_prefill else Role.DECODE
        actions += [
            SwitchRole(time_s=now.start_s, worker_id=f"{shape}-{number}", role=role)
            for number in range(low, high)
        ]
    return actions


class Mover:
    """By :attr:`Rule.LEAST_WORK`: looks at the cluster when a change is due."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._roles: dict[str, Role] = {}
        """What workers were told and may not have heard yet."""

    def follow(self, schedule: Schedule) -> None:
        for change in schedule[1:]:
            self._simulation.queue.at(change.start_s, self._change, change.num_prefill)

    def _change(self, now_s: float, num_prefill: int) -> None:
        workers = list(self._simulation.cluster.workers())
        prefilling = [worker for worker in workers if self._role(worker) is Role.PREFILL]
        missing = num_prefill - len(prefilling)
        role = Role.PREFILL if missing > 0 else Role.DECODE
        others = [worker for worker in workers if self._role(worker) is not role]
        others.sort(key=_work)
        chosen = [worker.worker_id for worker in others[: abs(missing)]]
        self._roles.update(dict.fromkeys(chosen, role))
        self._simulation.cluster.schedule(
            [SwitchRole(time_s=now_s, worker_id=worker_id, role=role) for worker_id in chosen]
        )

    def _role(self, worker: SimulatedWorker) -> Role:
        return self._roles.get(worker.worker_id, worker.role)


def _work(worker: SimulatedWorker) -> tuple[int, int]:
    load = worker.load()
    return load.num_running + load.num_waiting, load.waiting_prefill_tokens
