"""vllm-router before four vLLM servers.

The router does not start servers: this does, and starts one again at once when it has been killed, as a
service manager would.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from benchmarks.fault_environments import VLLM_ROUTER
from benchmarks.fault_settings import ENGINE_ARGS, HEALTH_CHECK_S, KV_TRANSFER, PACE, START_TIMEOUT_S
from benchmarks.fault_systems import SPLIT, Held, Worker, answers, end, start, vllm_held, wait_ready
from benchmarks.model import NAME
from benchmarks.servers import free_port
from deploy.environment import CPU_ENGINE_ENVIRONMENT
from deploy.settings import LOOPBACK

OPTIONS = (
    "--vllm-pd-disaggregation --kv-connector nixl --policy round_robin "
    f"--health-check-interval-secs {HEALTH_CHECK_S:.0f} --health-check-timeout-secs 2 "
    "--health-failure-threshold 1 --health-success-threshold 1 "
    "--cb-failure-threshold 2 --cb-success-threshold 1 --cb-timeout-duration-secs 5 "
    "--worker-startup-check-interval 1 --request-timeout-secs 120"
)
"""Health checks every second in place of every minute, a circuit breaker that opens after two failures in
place of ten and tries again after 5 s in place of 60; retries as they are by default, five of them."""


class VllmRouter:
    """The router and its servers."""

    name = "vllm-router"
    restarts_itself = False

    def __init__(self, model_dir: Path, logs: Path) -> None:
        self._model_dir = model_dir
        self._logs = logs
        self._ports = {
            f"{role}-{number}": free_port() for role, count in SPLIT.items() for number in range(count)
        }
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._port = free_port()
        self.url = f"http://{LOOPBACK}:{self._port}"

    def __enter__(self) -> VllmRouter:
        self._stack = contextlib.ExitStack()
        try:
            for name in self._ports:
                self._start_server(name)
            for name, server in self._servers.items():
                wait_ready(name, server, lambda name=name: self._is_ready(name), START_TIMEOUT_S)
            command = [str(VLLM_ROUTER.make() / "bin" / "vllm-router"), *OPTIONS.split()]
            for name, port in self._ports.items():
                command += [f"--{name.partition('-')[0]}", f"http://{LOOPBACK}:{port}"]
            command += ["--host", LOOPBACK, "--port", str(self._port), "--prometheus-port", str(free_port())]
            router = start(command, os.environ, self._logs / "vllm-router.log")
            self._stack.callback(end, router, 5)
            wait_ready(self.name, router, lambda: answers(f"{self.url}/health"), START_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for server in self._servers.values():
            server.terminate()  # all at once
        for server in self._servers.values():
            end(server, 10)

    def workers(self) -> list[Worker]:
        return [
            Worker(name, name.partition("-")[0], psutil.Process(server.pid))
            for name, server in self._servers.items()
            if server.poll() is None and self._is_ready(name)
        ]

    def held(self) -> Mapping[str, Held]:
        held = {}
        for name, port in self._ports.items():
            with contextlib.suppress(httpx.HTTPError):
                held[name] = vllm_held(httpx.get(f"http://{LOOPBACK}:{port}/metrics", timeout=5).text)
        return held

    def restart(self, victims: Sequence[Worker]) -> None:
        for victim in victims:
            end(self._servers[victim.name], 0)
            self._start_server(victim.name)

    def _is_ready(self, name: str) -> bool:
        return answers(f"http://{LOOPBACK}:{self._ports[name]}/health")

    def _start_server(self, name: str) -> None:
        arguments = {**ENGINE_ARGS, **PACE, "kv_transfer_config": KV_TRANSFER}
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
        command += ["--model", str(self._model_dir), "--served-model-name", NAME, "--host", LOOPBACK]
        command += ["--port", str(self._ports[name]), "--disable-uvicorn-access-log"]
        for key, value in arguments.items():
            flag = "--" + key.replace("_", "-")
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            command += [flag] if value is True else [flag, text]
        environment = {
            **os.environ,
            **CPU_ENGINE_ENVIRONMENT,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        }
        self._servers[name] = start(command, environment, self._logs / f"vllm-{name}.log")
