"""The two systems under test, started alike: plain vLLM's own server, and Baton with one worker a role."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.model import NAME
from deploy.config import parse_config
from deploy.config_schema import BatonConfig
from deploy.environment import worker_environment
from deploy.settings import LOOPBACK

_START_TIMEOUT_S = 180.0
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 128,
    "kv_cache_memory_bytes": 384 << 20,
}
"""Of every engine, plain vLLM's and both of Baton's."""
_NO_CHANGES: Mapping[str, Any] = {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def baton_config(model_dir: Path, *, router: Mapping[str, Any] = _NO_CHANGES, **shape: Any) -> BatonConfig:
    """One prefill and one decode worker on this machine.

    Nothing is refused for being late, as plain vLLM refuses nothing.

    Args:
        router: keys of the router section that differ.
        shape: keys of the shape that differ.
    """
    return parse_config(
        {
            "models": [
                {
                    "name": NAME,
                    "path": str(model_dir),
                    "slo": {"ttft_ms": 2000, "tpot_ms": 200},
                    "shapes": [
                        {
                            "name": "cpu",
                            "count": 2,
                            "initial": {"prefill": 1, "decode": 1},
                            "gpus_per_worker": 0,
                            "cpus_per_worker": 0.25,
                            **({"engine_args": ENGINE_ARGS} | shape),
                        }
                    ],
                }
            ],
            "router": {"port": free_port(), "admission": {"early_rejection": False}, **router},
            "kv_transfer": {"buffer_device": "cpu"},
            "startup_timeout_s": _START_TIMEOUT_S,
            "drain_timeout_s": 5,
        }
    )


class PlainVllm:
    """vLLM's OpenAI server with one engine, in the environment that Baton gives its engines."""

    def __init__(
        self, model_dir: Path, config: BatonConfig, engine_args: Mapping[str, Any] = ENGINE_ARGS
    ) -> None:
        self._model_dir = model_dir
        self._engine_args = engine_args
        self._environment = os.environ | dict(worker_environment(config.models[0].shapes[0]))
        self.port = free_port()

    def __enter__(self) -> PlainVllm:
        arguments = ["--model", str(self._model_dir), "--served-model-name", NAME, "--host", LOOPBACK]
        arguments += ["--port", str(self.port), "--disable-uvicorn-access-log", "--disable-log-stats"]
        for name, value in self._engine_args.items():
            flag = "--" + name.replace("_", "-")
            arguments += [flag] if value is True else [flag, str(value)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *arguments],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"plain vLLM ended with {self._process.returncode} while starting")
            try:
                if httpx.get(f"http://{LOOPBACK}:{self.port}/health", timeout=1).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.25)
        raise RuntimeError(f"plain vLLM was not ready in {_START_TIMEOUT_S:.0f} s")

    def __exit__(self, *_: object) -> None:
        family = [*psutil.Process(self._process.pid).children(recursive=True)]
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=5)
