"""Samples the cluster at regular times."""

from __future__ import annotations

import numpy as np

from core.types import Role
from simulator.cluster import SimulatedCluster
from simulator.result import Timeline

_Row = tuple[float, int, int, int, int, int, int, float]


class TimelineRecorder:
    """One row a sample."""

    def __init__(self) -> None:
        self._rows: list[_Row] = []

    def sample(self, now_s: float, cluster: SimulatedCluster) -> None:
        num_by_role = {Role.PREFILL: 0, Role.DECODE: 0}
        prefill_tokens = num_waiting = num_running = kv_used = kv_total = 0
        for worker in cluster.workers():
            num_by_role[worker.role] += 1
            load = worker.load()
            prefill_tokens += load.waiting_prefill_tokens
            num_waiting += load.num_waiting
            num_running += load.num_running
            if worker.role is Role.DECODE:
                kv_used += load.kv_used_blocks
                kv_total += worker.group.worker.num_kv_blocks
        self._rows.append(
            (
                now_s,
                num_by_role[Role.PREFILL],
                num_by_role[Role.DECODE],
                cluster.num_starting,
                prefill_tokens,
                num_waiting,
                num_running,
                kv_used / kv_total if kv_total else 0.0,
            )
        )

    def timeline(self) -> Timeline:
        table = np.array(self._rows, dtype=np.float64).reshape(-1, 8)
        counts = table.astype(np.int64)
        return Timeline(
            time_s=table[:, 0],
            num_prefill_workers=counts[:, 1],
            num_decode_workers=counts[:, 2],
            num_starting_workers=counts[:, 3],
            waiting_prefill_tokens=counts[:, 4],
            num_waiting=counts[:, 5],
            num_running=counts[:, 6],
            kv_use=table[:, 7],
        )
