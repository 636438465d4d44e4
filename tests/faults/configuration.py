"""The cluster that is broken: two prefill and two decode workers, two routers, everything impatient.

Its engines keep a set pace, so that a prefill and an answer last long enough to be hit on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.integration.server_process import free_port

MODEL = "tiny"
NUM_PREFILL, NUM_DECODE = 2, 2
NUM_ROUTERS = 2
PREFILL_MS_PER_TOKEN = 0.5
DECODE_STEP_MS = 30
LEASE_S = 5
HEARTBEAT_S = 0.5
PREFILL_TIMEOUT_S = 6
STALL_TIMEOUT_S = 6
DRAIN_TIMEOUT_S = 30
START_TIMEOUT_S = 240.0

ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 2048,
    # A seeded prompt that is computed in chunks makes vLLM's CPU engine fail.
    "max_num_batched_tokens": 16384,
    "kv_cache_memory_bytes": 128 << 20,
}
_PACE = {
    "worker_cls": "engine.paced_worker.PacedCPUWorker",
    "additional_config": {
        "baton_pace_prefill_base_ms": 20,
        "baton_pace_prefill_ms_per_token": PREFILL_MS_PER_TOKEN,
        "baton_pace_decode_base_ms": DECODE_STEP_MS,
        "baton_pace_decode_ms_per_seq": 1,
    },
}


def configuration(model_path: Path, port: int | None = None, *, paced: bool = True) -> dict[str, Any]:
    """As ``baton serve`` takes it.

    Args:
        paced: False gives engines that run as fast as they can, for reference answers.
    """
    shape = {
        "name": "cpu",
        "count": NUM_PREFILL + NUM_DECODE,
        "initial": {"prefill": NUM_PREFILL, "decode": NUM_DECODE},
        "gpus_per_worker": 0,
        "cpus_per_worker": 0.25,
        "engine_args": ENGINE_ARGS | (_PACE if paced else {}),
    }
    # Requests that are to be refused when they would be late say so in their headers.
    slo = {"ttft_ms": 120_000, "tpot_ms": 1000}
    return {
        "models": [{"name": MODEL, "path": str(model_path), "slo": slo, "shapes": [shape]}],
        "router": {
            "port": port or free_port(),
            "replicas": NUM_ROUTERS,
            "prefill_timeout_s": PREFILL_TIMEOUT_S,
            "stall_timeout_s": STALL_TIMEOUT_S,
        },
        "planner": {"mode": "advise"},
        "registry": {"heartbeat_s": HEARTBEAT_S, "missed_heartbeats": 6},
        "kv_transfer": {"buffer_device": "cpu", "lease_s": LEASE_S},
        "startup_timeout_s": START_TIMEOUT_S,
        "drain_timeout_s": DRAIN_TIMEOUT_S,
    }
