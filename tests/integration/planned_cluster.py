"""A cluster of mock workers whose roles tests can change, and what its planner says."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.integration.planned_process import ASSIGNED, READY
from tests.integration.served import ServedByBaton
from tests.integration.server_process import HOST, ServerProcess, free_port

STEP_MS = 50


class PlannedCluster(ServedByBaton):
    """A running cluster."""

    process: ServerProcess
    _num_assigned = 0

    def roles(self) -> dict[str, str]:
        return {worker["worker_id"]: worker["role"] for worker in self.workers()}

    def of(self, role: str) -> list[str]:
        return sorted(worker_id for worker_id, now in self.roles().items() if now == role)

    def assign(self, roles: dict[str, str]) -> float:
        """Returns when it was asked for, on the monotonic clock."""
        self.process.send_line(json.dumps(roles))
        self._num_assigned += 1
        self.process.wait_until(
            lambda: self.process.log_tail(1 << 20).count(ASSIGNED) >= self._num_assigned, 20.0
        )
        return float(self.process.log_tail(1 << 20).rpartition(ASSIGNED)[2].split()[0])

    def replica(self, deployment: str) -> psutil.Process:
        (found,) = [each for each in self.processes() if f":{deployment}" in " ".join(each.cmdline())]
        return found

    def planner(self, query: str = "") -> dict[str, Any]:
        return dict(self.get(f"/baton/planner{query}"))


def eventually(what: str, holds: Callable[[], bool], within_s: float) -> float:
    """Waits; returns how long it took."""
    began_s = time.monotonic()
    while True:
        try:
            if holds():
                return time.monotonic() - began_s
        except httpx.HTTPError:
            pass
        assert time.monotonic() - began_s < within_s, f"not within {within_s} s: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def planned_cluster(
    model_path: Path,
    run_dir: Path,
    *,
    mode: str,
    slo: dict[str, float] | None = None,
    prefill_ms_per_1k_tokens: float = 50.0,
    shape: dict[str, Any] | None = None,
    **settings: dict[str, Any],
) -> Iterator[PlannedCluster]:
    """Four workers, one of them for prefill, unless ``shape`` says else.

    Args:
        settings: sections of the configuration.
    """
    port = free_port()
    config = run_dir / "planned.yaml"
    configuration = _configuration(model_path, port, mode)
    (model,) = configuration["models"]
    model["slo"] |= slo or {}
    model["shapes"][0]["mock"]["prefill_ms_per_1k_tokens"] = prefill_ms_per_1k_tokens
    model["shapes"][0] |= shape or {}
    for section, values in settings.items():
        configuration[section] |= values
    config.write_text(json.dumps(configuration))
    command = [sys.executable, "-m", "tests.integration.planned_process", str(config)]
    process = ServerProcess("the cluster", command, {"HF_HUB_OFFLINE": "1"}, run_dir / "planned.log")
    try:
        process.wait_until(lambda: READY in process.log_tail(1 << 20), 180)
        cluster = PlannedCluster(f"http://{HOST}:{port}", "mock", pid=process.pid)
        cluster.process = process
        yield cluster
        cluster.close()
    finally:
        process.stop(grace_s=40)


def _configuration(model_path: Path, port: int, mode: str) -> dict[str, Any]:
    return {
        "models": [
            {
                "name": "mock",
                "path": str(model_path),
                "slo": {"ttft_ms": 5000, "tpot_ms": 500},
                "shapes": [
                    {
                        "name": "mock",
                        "count": 4,
                        "initial": {"prefill": 1, "decode": 3},
                        "gpus_per_worker": 0,
                        "cpus_per_worker": 0.1,
                        "engine": "mock",
                        "mock": {"decode_step_ms": STEP_MS},
                    }
                ],
            }
        ],
        "router": {"port": port},
        "planner": {"mode": mode},
        "kv_transfer": {"buffer_device": "cpu", "lease_s": 5},
        "startup_timeout_s": 120,
        "drain_timeout_s": 5,
    }
