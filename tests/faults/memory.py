"""Resident memory of the cluster's long-lived processes over time."""

from __future__ import annotations

import contextlib
import statistics

import psutil

from tests.faults.cluster import FaultCluster
from tests.faults.injections import haproxy_processes
from tests.faults.processes import titled

_TITLES = {
    "routers": ":Router",
    "Serve controller": "ServeController",
    "registry": ":Registry",
    "planner": ":Planner",
    "raylet": "raylet/raylet",
    "GCS": "gcs_server",
}


class MemoryWatch:
    """Call :meth:`sample` now and then."""

    def __init__(self, cluster: FaultCluster) -> None:
        self._cluster = cluster
        self.series: dict[str, list[tuple[float, float]]] = {}
        """By name, seconds and MiB; the mean where there are several processes."""

    def sample(self, now_s: float) -> None:
        family = self._cluster.processes()
        found = {name: titled(family, title) for name, title in _TITLES.items()}
        found["HAProxy"] = haproxy_processes(self._cluster)
        for name, processes in found.items():
            sizes = [size for process in processes if (size := _resident_mib(process))]
            if sizes:
                self.series.setdefault(name, []).append((round(now_s, 1), round(statistics.mean(sizes), 1)))

    def tenths(self) -> dict[str, tuple[float, float]]:
        """By name, MiB in the first and in the last tenth of the time, after a minute's warm-up."""
        medians = {}
        for name, series in self.series.items():
            warm = [size for at_s, size in series if at_s > 60] or [size for _, size in series]
            tenth = max(1, len(warm) // 10)
            medians[name] = statistics.median(warm[:tenth]), statistics.median(warm[-tenth:])
        return medians


def _resident_mib(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        return float(process.memory_info().rss) / (1 << 20)
    return 0.0
