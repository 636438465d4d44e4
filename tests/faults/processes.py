"""Finds the processes of a running cluster by what they are, and signals them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from deploy.processes import MARK


@dataclass(frozen=True)
class WorkerProcesses:
    """One worker."""

    worker_id: str
    role: str
    address: str
    replica: psutil.Process
    engine: psutil.Process | None
    """The engine core, a child of the replica; None if it is gone."""

    @property
    def all(self) -> list[psutil.Process]:
        return [self.replica] if self.engine is None else [self.replica, self.engine]


def titled(family: Sequence[psutil.Process], title: str) -> list[psutil.Process]:
    """Processes of a family whose command line has ``title`` in it, as Ray and Serve name their own."""
    return [process for process in family if title in _title(process)]


def worker_processes(
    family: Sequence[psutil.Process], workers: Sequence[dict[str, Any]]
) -> dict[str, WorkerProcesses]:
    """Processes by worker id.

    Args:
        family: of the cluster.
        workers: as ``/baton/status`` tells of them; those whose process is gone are left out.
    """
    by_address: dict[int, psutil.Process] = {}
    for process in titled(family, "ServeReplica"):
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    by_address[connection.laddr.port] = process
    found = {}
    for worker in workers:
        replica = by_address.get(int(worker["address"].rpartition(":")[2]))
        if replica is not None:
            found[worker["worker_id"]] = WorkerProcesses(
                worker["worker_id"], worker["role"], worker["address"], replica, _engine_of(replica)
            )
    return found


def orphans(cluster_pid: int, mark: str) -> list[psutil.Process]:
    """Processes of a cluster that no longer descend from the one that started it."""
    family = {process.pid for process in psutil.Process(cluster_pid).children(recursive=True)}
    return [each for each in _marked(mark) if each.pid != cluster_pid and each.pid not in family]


def send(number: signal.Signals, *processes: psutil.Process) -> None:
    """Signals processes; one that is gone is not missed."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def describe(process: psutil.Process) -> str:
    return f"{process.pid} {_title(process)[:120]}"


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _engine_of(replica: psutil.Process) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = [child for child in replica.children() if "tracker" not in _title(child)]
        return max(children, key=lambda child: child.memory_info().rss, default=None)
    return None


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.pid != os.getpid() and process.environ().get(MARK) == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                yield process
