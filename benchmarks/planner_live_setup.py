"""The cluster of the live planner benchmark: four paced engines of one shape, real and simulated.

Decode workers take 32 answers at a time. Beyond those, prefilled prompts wait on prefill workers until their
KV is pulled: a worker that changes roles has many requests to finish, whichever role it had.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.model import NAME
from benchmarks.planner_live_load import Phase
from benchmarks.servers import free_port
from core.performance_model import KvLink, LinearStepTime, PrefillChunk
from core.performance_profile import DecodePoint, PerformanceProfile, PrefillPoint
from core.types import Role
from deploy.config import parse_config
from deploy.config_schema import BatonConfig
from deploy.planner_settings import planner_replica_settings
from engine.pacing import KEY_PREFIX
from simulator.result import Slo
from simulator.scenario import worker_group
from simulator.spec import ClusterSpec
from simulator.traces.trace import Trace

STEP_TIME = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.6,
    prefill_base_ms=120.0,
    decode_base_ms=40.0,
    decode_ms_per_seq=2.0,
    decode_ms_per_kv_token=0.002,
)
SLO = Slo(ttft_s=1.5, tpot_s=0.15)
SHAPE = "worker"
NUM_WORKERS = 4
LONG_PROMPTS = Phase(
    name="long prompts", seconds=45.0, rate_rps=9.5, prompt_tokens=(270, 330), output_tokens=(4, 8)
)
LONG_ANSWERS = Phase(
    name="long answers", seconds=60.0, rate_rps=15.0, prompt_tokens=(20, 40), output_tokens=(50, 60)
)
_MAX_MODEL_TOKENS, _MAX_BATCHED_TOKENS, _MAX_SEQS = 1024, 384, 32
_KV_TOKENS, _BLOCK_TOKENS, _KV_BYTES_PER_TOKEN = 32768, 128, 8192
_ROUTER_S = 0.014
"""As fitted by the fidelity benchmark."""


def live_config(
    model_dir: Path, profile: Path, *, num_prefill: int = 2, slo: Slo = SLO, mode: str = "auto"
) -> BatonConfig:
    """Real engines; nothing is refused, and nothing waits but on workers.

    Args:
        profile: where :func:`paced_profile` is written.
    """
    return parse_config(
        {
            "models": [
                {
                    "name": NAME,
                    "path": str(model_dir),
                    "slo": {"ttft_ms": slo.ttft_s * 1e3, "tpot_ms": slo.tpot_s * 1e3},
                    "shapes": [
                        {
                            "name": SHAPE,
                            "count": NUM_WORKERS,
                            "initial": {"prefill": num_prefill, "decode": NUM_WORKERS - num_prefill},
                            "gpus_per_worker": 0,
                            "cpus_per_worker": 0.25,
                            "engine_args": _paced(engine_args()),
                            "profile": str(profile),
                        }
                    ],
                }
            ],
            "router": {"port": free_port(), "admission": {"enabled": False}},
            "planner": {"mode": mode},
            "kv_transfer": {"buffer_device": "cpu"},
            "startup_timeout_s": 180.0,
            "drain_timeout_s": 5,
        }
    )


def engine_args() -> dict[str, Any]:
    """Of every engine, the plain one among them: in float32 greedy answers have no ties."""
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": _MAX_MODEL_TOKENS,
        "max_num_batched_tokens": _MAX_BATCHED_TOKENS,
        "max_num_seqs": _MAX_SEQS,
        "kv_cache_memory_bytes": _KV_TOKENS * _KV_BYTES_PER_TOKEN,
    }


def _paced(arguments: dict[str, Any]) -> dict[str, Any]:
    pace = {KEY_PREFIX + name: value for name, value in asdict(STEP_TIME).items()}
    return {
        **arguments,
        "async_scheduling": False,
        "worker_cls": "engine.paced_worker.PacedCPUWorker",
        "additional_config": pace,
    }


def paced_profile() -> PerformanceProfile:
    """What the pace makes of a worker, as `baton profile` would measure it."""

    def prompt(num_tokens: int) -> PrefillPoint:
        chunk = PrefillChunk(context_tokens=0, num_tokens=num_tokens, ends_prompt=True)
        return PrefillPoint(prompt_tokens=num_tokens, seconds=STEP_TIME.step_s((chunk,), 0, 0))

    def batch(num: int, kv_tokens: int) -> DecodePoint:
        return DecodePoint(
            num_decoding=num, kv_tokens=num * kv_tokens, seconds=STEP_TIME.step_s((), num, num * kv_tokens)
        )

    return PerformanceProfile(
        name="paced",
        source="the pace of the live planner benchmark",
        model=NAME,
        accelerator="paced CPU",
        gpus_per_worker=0,
        kv_capacity_tokens=_KV_TOKENS,
        block_size_tokens=_BLOCK_TOKENS,
        kv_bytes_per_token=_KV_BYTES_PER_TOKEN,
        max_num_seqs=_MAX_SEQS,
        max_num_batched_tokens=_MAX_BATCHED_TOKENS,
        prefill=tuple(map(prompt, (16, 64, 128, 256, 512))),
        decode=tuple(batch(num, kv) for num in (1, 2, 4, 12, 32) for kv in (32, 512)),
        link=KvLink(latency_s=0.002, bytes_per_s=10e9),
    )


def simulated_cluster(
    config: BatonConfig, profile: PerformanceProfile, trace: Trace, num_prefill: int = 2
) -> ClusterSpec:
    """The same cluster with the same planner, simulated."""
    (model,) = config.models
    counts = {Role.PREFILL: num_prefill, Role.DECODE: NUM_WORKERS - num_prefill}
    return ClusterSpec(
        groups=(worker_group(profile, trace, counts, shape=SHAPE),),
        ttft_slo_s=model.slo.ttft_ms / 1e3,
        tpot_slo_s=model.slo.tpot_ms / 1e3,
        router_s=_ROUTER_S,
        planner=planner_replica_settings(config, model, None).planner,
    )
