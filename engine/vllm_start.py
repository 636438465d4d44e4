"""What a vLLM engine is started with, and its start: which phase it is in, what it says of itself then."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.observed_steps import StepSample
from engine.base import EngineInfo
from engine.kv_events import KvEventReader
from engine.step_meter import observation
from engine.vllm_args import engine_arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmEngineSpec:
    """Everything an engine start needs; plain data, so that it can be sent to another process."""

    incarnation: str
    """Identity of this engine start, unique in the cluster; also vLLM's KV engine id."""
    model: str
    """Served model name."""
    model_path: str
    revision: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Passed to vLLM's AsyncEngineArgs as they are."""
    lora_modules: Mapping[str, str] = field(default_factory=dict)
    connector_class: str = ""
    connector_module: str = ""
    worker_extension: str = ""
    kv_buffer_device: str = "cpu"
    lease_s: int = 30
    connector_options: Mapping[str, Any] = field(default_factory=dict)
    side_channel_host: str = "127.0.0.1"
    side_channel_port: int = 0
    num_pinned_stat: str = ""
    """Name of the connector statistic that counts pinned prompts."""
    steps_stat: str = ""
    """Name of the connector statistic that holds steps, as ``engine.step_meter`` describes them."""
    startup_timeout_s: float = 600.0
    kv_events: bool = False
    """Follow the prefix cache, for ``VllmEngine.cache_log``; costs a full step of prefill a few ms."""


class StartProgress:
    """Which phase a start is in, readable from another thread."""

    def __init__(self) -> None:
        self.phase = "import"
        self.done_s: dict[str, float] = {}
        self._since_s = time.monotonic()

    def next(self, phase: str) -> None:
        now_s = time.monotonic()
        self.done_s[self.phase] = round(now_s - self._since_s, 3)
        self.phase, self._since_s = phase, now_s

    def describe(self) -> str:
        return ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.done_s.items()) or "nothing"


@dataclass(slots=True)
class LoadGauge:
    """The scheduler's latest statistics."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_pinned: int = 0
    num_expired_leases: int = 0
    steps: StepSample = field(default_factory=StepSample)


def build(
    spec: VllmEngineSpec, events: KvEventReader | None, progress: StartProgress
) -> tuple[Any, EngineInfo, LoadGauge]:
    """Starts the engine process and waits until it is ready: seconds to minutes.

    Args:
        progress: told which phase this is in.

    Returns:
        vLLM's AsyncLLM, what it is, and its statistics, always the latest ones.

    Raises:
        ValueError: arguments that do not go with KV handoffs; whatever else vLLM raises.
    """
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = spec.side_channel_host
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(spec.side_channel_port)
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from engine.replay import replay_processor

    progress.next("configure")
    arguments = engine_arguments(spec.engine_args)
    if events is not None:
        arguments["kv_events_config"] = events.config()
    if arguments.get("tensor_parallel_size", 1) > 1:
        # All its devices are on one node; inside a placement group vLLM would ask Ray for more of them.
        arguments.setdefault("distributed_executor_backend", "mp")
    if spec.lora_modules:
        arguments.setdefault("enable_lora", True)
    if spec.connector_class:
        arguments["kv_transfer_config"] = KVTransferConfig(
            kv_connector=spec.connector_class,
            kv_connector_module_path=spec.connector_module,
            kv_role="kv_both",
            engine_id=spec.incarnation,
            kv_buffer_device=spec.kv_buffer_device,
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"kv_lease_duration": spec.lease_s, **spec.connector_options},
        )
        arguments["worker_extension_cls"] = spec.worker_extension
    config = AsyncEngineArgs(
        model=spec.model_path,
        revision=spec.revision,
        served_model_name=[spec.model],
        disable_log_stats=False,
        enable_log_requests=False,
        **arguments,
    ).create_engine_config()
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("pipeline_parallel_size > 1 cannot take part in KV handoffs")
    if (processor := replay_processor(config)) is not None:
        config.model_config.logits_processors = [*(config.model_config.logits_processors or ()), processor]
    gauge = LoadGauge()
    progress.next("engine")
    llm = AsyncLLM.from_vllm_config(config, stat_loggers=[_gauge_logger(gauge, spec)])
    progress.next("ready")
    return llm, _info(spec, llm.vllm_config, progress), gauge


def _info(spec: VllmEngineSpec, config: Any, progress: StartProgress) -> EngineInfo:
    import torch
    import vllm
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    model, cache = config.model_config, config.cache_config
    dtype = STR_DTYPE_TO_TORCH_DTYPE.get(cache.cache_dtype, model.dtype)
    num_layers = model.get_total_num_hidden_layers()
    heads, head_size = model.get_total_num_kv_heads(), model.get_head_size()
    layout = (
        vllm.__version__, str(dtype), num_layers, heads, head_size, model.use_mla,
        model.get_sliding_window(), config.scheduler_config.disable_hybrid_kv_cache_manager,
    )  # fmt: skip
    return EngineInfo(
        incarnation=spec.incarnation,
        model=spec.model,
        block_size_tokens=cache.block_size,
        num_kv_blocks=cache.num_gpu_blocks or 0,
        bytes_per_block=2
        * num_layers
        * heads
        * head_size
        * torch.empty((), dtype=dtype).element_size()
        * cache.block_size,
        max_model_len=model.max_model_len,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        tp_size=config.parallel_config.tensor_parallel_size,
        kv_layout=hashlib.blake2b(repr(layout).encode(), digest_size=8).hexdigest(),
        startup_s=dict(progress.done_s),
    )


def _gauge_logger(gauge: LoadGauge, spec: VllmEngineSpec) -> Any:
    """A vLLM stat logger factory that keeps only the latest values."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class GaugeLogger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is None:
                return
            gauge.num_running = scheduler_stats.num_running_reqs
            gauge.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            gauge.kv_usage = scheduler_stats.kv_cache_usage
            connector_stats = scheduler_stats.kv_connector_stats or {}
            if pinned_by_rank := connector_stats.get(spec.num_pinned_stat):
                gauge.num_pinned = max(pinned_by_rank)
            gauge.num_expired_leases += len(connector_stats.get("num_kv_expired_reqs", ()))
            if steps := connector_stats.get(spec.steps_stat):
                for row in steps:
                    gauge.steps.add(observation(row))
                connector_stats[spec.steps_stat] = []  # for vLLM's own log they would be transfers

        def log_engine_initialized(self) -> None:
            pass

    return GaugeLogger
