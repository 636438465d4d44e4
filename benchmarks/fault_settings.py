"""What all systems of the fault benchmark have in common: model, engines, pace.

Engines keep a set pace, slower than they could, so that a prefill and an answer last long enough to be hit,
and equally long in every system.
"""

from __future__ import annotations

from typing import Any

from engine.pacing import KEY_PREFIX

NUM_PREFILL, NUM_DECODE = 2, 2
PREFILL_MS_PER_TOKEN = 0.5
DECODE_STEP_MS = 30.0
NUM_KV_BLOCKS = 384
"""Of each engine: the tiny model's KV is 8 KiB a token in float32, so a block of 128 tokens is 1 MiB."""
START_TIMEOUT_S = 240.0
HEALTH_CHECK_S = 1.0
"""Period of health checks, of the systems where it can be set; their defaults are 10 s and more."""

ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": NUM_KV_BLOCKS << 20,
}
"""Of every engine: in float32, greedy answers of this model have no ties."""
PACE: dict[str, Any] = {
    "worker_cls": "engine.paced_worker.PacedCPUWorker",
    "additional_config": {
        f"{KEY_PREFIX}prefill_base_ms": 20.0,
        f"{KEY_PREFIX}prefill_ms_per_token": PREFILL_MS_PER_TOKEN,
        f"{KEY_PREFIX}decode_base_ms": DECODE_STEP_MS,
        f"{KEY_PREFIX}decode_ms_per_seq": 1.0,
    },
}
KV_TRANSFER: dict[str, Any] = {
    "kv_connector": "NixlConnector",
    "kv_connector_module_path": "benchmarks.fault_peer_connector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    "kv_load_failure_policy": "recompute",
}
"""Of the peers' engines. ``recompute`` is vLLM's option for failed pulls, which else end the request."""
