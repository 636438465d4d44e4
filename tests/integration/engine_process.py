"""A process that starts one engine, says so with the pids below it, and waits to be killed.

python -m tests.integration.engine_process MODEL_PATH
"""

from __future__ import annotations

import asyncio
import os
import sys

import psutil

from core.errors import StartupError
from deploy.environment import CPU_ENGINE_ENVIRONMENT
from engine.vllm_engine import VllmEngine
from engine.vllm_start import VllmEngineSpec
from kv_transfer.params import STEP_METER_OPTION, STEPS_STAT
from kv_transfer.peer import free_port

READY = "engine ready"
ENVIRONMENT = {**CPU_ENGINE_ENVIRONMENT, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def engine_spec(model_path: str, **changes: object) -> VllmEngineSpec:
    """A small CPU engine with Baton's connector."""
    fields = {
        "incarnation": "engine",
        "model": "tiny",
        "model_path": model_path,
        "engine_args": {
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 32 << 20,
        },
        "connector_class": "BatonConnector",
        "connector_module": "kv_transfer.connector",
        "connector_options": {STEP_METER_OPTION: "engine.step_meter.StepMeter"},
        "steps_stat": STEPS_STAT,
        "worker_extension": "kv_transfer.worker_extension.BatonWorkerExtension",
        "side_channel_port": free_port("127.0.0.1"),
    }
    return VllmEngineSpec(**{**fields, **changes})


async def main() -> None:
    model_path, startup_timeout_s = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 120.0
    try:
        engine = await VllmEngine.start(engine_spec(model_path, startup_timeout_s=startup_timeout_s))
    except StartupError as error:
        print(error, flush=True)
        os._exit(1)  # as a replica ends whose constructor failed
    children = [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE
    ]
    print(READY, *children, flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await engine.shutdown(timeout_s=1.0)


if __name__ == "__main__":
    asyncio.run(main())
