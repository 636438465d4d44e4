"""Baton, started by ``baton serve``, with its defaults but for what all systems have in common."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.fault_settings import ENGINE_ARGS, PACE, START_TIMEOUT_S
from benchmarks.fault_systems import SPLIT, Held, Worker, end, start, wait_ready
from benchmarks.model import NAME
from benchmarks.servers import free_port
from deploy.settings import LOOPBACK

_HELD = re.compile(
    r"^baton_worker_(kv_used_blocks|running_requests|waiting_requests)\{[^}]*\} (\S+)$", re.MULTILINE
)


class Baton:
    """One cluster."""

    name = "Baton"
    restarts_itself = True

    def __init__(self, model_dir: Path, logs: Path) -> None:
        self._logs = logs
        self._port = free_port()
        self._config = configuration(model_dir, self._port)
        self.url = f"http://{LOOPBACK}:{self._port}"

    def __enter__(self) -> Baton:
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / "baton.yaml"
        path.write_text(json.dumps(self._config))
        command = [str(Path(sys.executable).with_name("baton")), "serve", str(path)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._process = start(command, environment, self._logs / "baton.log")
        try:
            wait_ready(self.name, self._process, self._is_ready, START_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process, 30)

    def workers(self) -> list[Worker]:
        replicas = _replicas_by_port(self._process.pid)
        ready = self._ready_workers()
        by_port = {int(each["address"].rpartition(":")[2]): each for each in ready}
        return [
            Worker(each["worker_id"], each["role"], replicas[port])
            for port, each in by_port.items()
            if port in replicas
        ]

    def held(self) -> Mapping[str, Held]:
        held = {}
        for worker in self._ready_workers():
            with contextlib.suppress(httpx.HTTPError):
                text = httpx.get(f"http://{worker['metrics_address']}/metrics", timeout=5).text
                values = {name: round(float(value)) for name, value in _HELD.findall(text)}
                requests = values["running_requests"] + values["waiting_requests"]
                held[worker["worker_id"]] = Held(values["kv_used_blocks"], requests)
        return held

    def restart(self, victims: Sequence[Worker]) -> None:
        """Ray Serve does it."""

    def _is_ready(self) -> bool:
        return len(self._ready_workers()) == sum(SPLIT.values())

    def _ready_workers(self) -> list[dict[str, Any]]:
        with contextlib.suppress(httpx.HTTPError):
            workers = httpx.get(f"{self.url}/baton/status", timeout=5).raise_for_status().json()["workers"]
            return [worker for worker in workers if worker["state"] == "ready"]
        return []


def configuration(model_dir: Path, port: int) -> dict[str, Any]:
    shape = {
        "name": "cpu",
        "count": sum(SPLIT.values()),
        "initial": dict(SPLIT),
        "gpus_per_worker": 0,
        "cpus_per_worker": 0.25,
        "engine_args": {**ENGINE_ARGS, **PACE},
    }
    # Nothing is refused for being late, as the peers refuse nothing.
    slo = {"ttft_ms": 60_000, "tpot_ms": 1000}
    return {
        "models": [{"name": NAME, "path": str(model_dir), "slo": slo, "shapes": [shape]}],
        "router": {"port": port, "admission": {"early_rejection": False}},
        "kv_transfer": {"buffer_device": "cpu"},
        "startup_timeout_s": START_TIMEOUT_S,
        "drain_timeout_s": 5,
    }


def _replicas_by_port(pid: int) -> dict[int, psutil.Process]:
    """Serve replicas by the ports they listen on."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("ServeReplica" in part for part in process.cmdline()):
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found[connection.laddr.port] = process
    return found
