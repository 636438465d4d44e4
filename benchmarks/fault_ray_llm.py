"""Ray Serve LLM with separate prefill and decode deployments, as ``build_pd_openai_app`` makes them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.fault_environments import RAY_SERVE_LLM
from benchmarks.fault_ray_llm_process import READY, REPLICAS
from benchmarks.fault_settings import (
    ENGINE_ARGS,
    HEALTH_CHECK_S,
    KV_TRANSFER,
    NUM_KV_BLOCKS,
    PACE,
    START_TIMEOUT_S,
)
from benchmarks.fault_systems import SPLIT, Held, Worker, end, start, wait_ready
from benchmarks.model import NAME
from benchmarks.servers import free_port
from deploy.environment import CPU_ENGINE_ENVIRONMENT
from deploy.settings import LOOPBACK

_STATUS_TIMEOUT_S = 5.0
_KV_USAGE = "ray_vllm_kv_cache_usage_perc"
_REQUESTS = ("ray_vllm_num_requests_running", "ray_vllm_num_requests_waiting")
_GAUGE = re.compile(
    rf'^({"|".join((_KV_USAGE, *_REQUESTS))}){{.*ReplicaId="([^"]+)".*}} (\S+)$', re.MULTILINE
)


class RayServeLlm:
    """A Ray with one Serve application."""

    name = "Ray Serve LLM"
    restarts_itself = True

    def __init__(self, model_dir: Path, logs: Path) -> None:
        self._model_dir = model_dir
        self._log = logs / "ray-serve-llm.log"
        self._port, self._metrics_port = free_port(), free_port()
        self.url = f"http://{LOOPBACK}:{self._port}"
        self._gauges: dict[tuple[str, str], float] = {}

    def __enter__(self) -> RayServeLlm:
        arguments = {
            "pd": self._pd_arguments(),
            "host": LOOPBACK,
            "port": self._port,
            "metrics_port": self._metrics_port,
        }
        python = RAY_SERVE_LLM.make() / "bin" / "python"
        command = [str(python), "-m", "benchmarks.fault_ray_llm_process", json.dumps(arguments)]
        environment = {
            **os.environ,
            **CPU_ENGINE_ENVIRONMENT,
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_metrics_report_interval_ms": "500",
        }
        self._process = start(command, environment, self._log)
        try:
            wait_ready(self.name, self._process, self._is_ready, START_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        end(self._process, 20, self._process.stdin.close)

    def _is_ready(self) -> bool:
        return f"\n{READY}\n" in self._log.read_text(errors="replace")

    def _replicas(self) -> list[dict[str, Any]]:
        """Of every deployment, as Serve's controller knows them; none if it does not answer."""
        assert self._process.stdin is not None
        num_seen = len(self._answers())
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        deadline_s = time.monotonic() + _STATUS_TIMEOUT_S
        while len(answers := self._answers()) == num_seen:
            if time.monotonic() > deadline_s:
                return []
            time.sleep(0.02)
        return list(json.loads(answers[-1].removeprefix(REPLICAS)))

    def _answers(self) -> list[str]:
        lines = self._log.read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith(REPLICAS) and line.endswith("]")]

    def _pd_arguments(self) -> dict[str, Any]:
        def deployment(role: str) -> dict[str, Any]:
            return {
                "model_loading_config": {"model_id": NAME, "model_source": str(self._model_dir)},
                "accelerator_config": {"kind": "cpu"},
                "placement_group_config": {"bundles": [{"CPU": 1}]},
                "engine_kwargs": {**ENGINE_ARGS, **PACE, "kv_transfer_config": dict(KV_TRANSFER)},
                "deployment_config": {
                    "num_replicas": SPLIT[role],
                    "health_check_period_s": HEALTH_CHECK_S,
                    "health_check_timeout_s": 10,
                },
                "experimental_configs": {"stream_batching_interval_ms": 0},
                "runtime_env": {"env_vars": CPU_ENGINE_ENVIRONMENT},
            }

        return {
            "prefill_config": deployment("prefill"),
            "decode_config": deployment("decode"),
            "ingress_deployment_config": {"num_replicas": 1, "autoscaling_config": None},
        }

    def workers(self) -> list[Worker]:
        found = []
        for replica in self._replicas():
            role = replica["deployment"].partition(":")[0].lower()
            if role in SPLIT and replica["state"] == "RUNNING":
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(replica["pid"])
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(Worker(replica["replica_id"], role, process))
        return found

    def held(self) -> Mapping[str, Held]:
        text = httpx.get(f"http://{LOOPBACK}:{self._metrics_port}/metrics", timeout=5).text
        for name, replica_id, value in _GAUGE.findall(text):
            # Ray leaves out a gauge that was not set since the last look.
            self._gauges[name, replica_id] = float(value)
        names = [worker.name for worker in self.workers()]
        return {
            name: Held(
                round(self._gauges.get((_KV_USAGE, name), 0.0) * (NUM_KV_BLOCKS - 1)),
                round(sum(self._gauges.get((metric, name), 0.0) for metric in _REQUESTS)),
            )
            for name in names
        }

    def restart(self, victims: Sequence[Worker]) -> None:
        """Ray Serve does it."""
