"""vLLM's AsyncLLM behind the engine interface."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from core.errors import StartupError, WorkerLost
from core.observed_steps import StepObservation, StepSample
from core.types import WorkerLoad
from engine.base import EngineDelta, EngineInfo, EngineRequest, KvParams
from engine.cache_log import CacheLog
from engine.kv_events import KvEventReader
from engine.step_meter import observation
from engine.vllm_args import engine_arguments

_CALL_TIMEOUT_S = 10.0


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


class VllmEngine:
    """One vLLM engine; make it with :meth:`start`."""

    def __init__(
        self,
        llm: Any,
        info: EngineInfo,
        gauge: _LoadGauge,
        events: KvEventReader | None,
        starter: ThreadPoolExecutor,
    ) -> None:
        from engine.vllm_codec import RequestDecoder, delta_from_output

        self._llm = llm
        self._info = info
        self._gauge = gauge
        self._events = events
        # The kernel ties the engine process's life to the thread that made it: keep that thread.
        self._starter = starter
        self._decoder = RequestDecoder(llm.vllm_config.model_config.get_vocab_size())
        self._delta_from_output = delta_from_output
        self._waiting_prompts: dict[str, int] = {}
        self._answers: set[str] = set()
        """Requests that have their first token and not their last one."""
        self._adapters: dict[int, tuple[str, str]] = {}
        """Name and path of the adapters that have been loaded, by number."""

    @staticmethod
    async def start(spec: VllmEngineSpec) -> VllmEngine:
        """Starts the engine process and waits until it is ready.

        Raises:
            StartupError: it failed, or was not ready within ``spec.startup_timeout_s``.
        """
        starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="baton-engine-start")
        progress = _StartProgress()
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            events = KvEventReader() if spec.kv_events else None
            if events is not None:
                undo.callback(events.close)
            try:
                llm, info, gauge = await asyncio.wait_for(
                    loop.run_in_executor(starter, _build, spec, events, progress), spec.startup_timeout_s
                )
            except TimeoutError:
                raise StartupError(
                    f"engine not ready after {spec.startup_timeout_s:.0f} s, still in phase "
                    f"{progress.phase!r} (done: {progress.describe()})"
                ) from None
            except Exception as error:
                raise StartupError(f"engine failed in phase {progress.phase!r}: {error}") from error
            undo.pop_all()
        if events is not None:
            events.start(model=spec.model, block_size_tokens=info.block_size_tokens)
        return VllmEngine(llm, info, gauge, events, starter)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def dead(self) -> bool:
        return self._llm.errored

    @property
    def cache_log(self) -> CacheLog | None:
        return None if self._events is None else self._events.log

    def load(self) -> WorkerLoad:
        gauge = self._gauge
        return WorkerLoad(
            num_running=gauge.num_running,
            num_decoding=len(self._answers),
            num_waiting=max(gauge.num_waiting, len(self._waiting_prompts) - gauge.num_running),
            waiting_prefill_tokens=sum(self._waiting_prompts.values()),
            kv_used_blocks=round(gauge.kv_usage * self._info.num_kv_blocks),
            num_pinned=gauge.num_pinned,
            num_expired_leases=gauge.num_expired_leases,
        )

    def take_steps(self) -> tuple[StepObservation, ...]:
        return self._gauge.steps.take()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        if request.replay_token_ids and self._llm.vllm_config.speculative_config is not None:
            raise ValueError("under speculative decoding vLLM cannot begin an answer with given tokens")
        params, options = self._decoder.decode(request)
        if (adapter := options.arguments.get("lora_request")) is not None:
            await self._load_adapter(adapter)
        self._waiting_prompts[request.request_id] = len(request.prompt_token_ids)
        first = True
        outputs = self._llm.generate(
            {"type": "token", "prompt_token_ids": request.prompt_token_ids, **options.prompt},
            params,
            request.request_id,
            priority=request.priority,
            trace_headers=dict(request.trace_headers) or None,
            **options.arguments,
        )
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if first:
                        self._waiting_prompts.pop(request.request_id, None)
                        if not output.finished:
                            self._answers.add(request.request_id)
                    yield self._delta_from_output(output, first=first)
                    first = False
        except EngineDeadError as error:
            raise WorkerLost("the engine process died") from error
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        finally:
            self._waiting_prompts.pop(request.request_id, None)
            self._answers.discard(request.request_id)

    async def _load_adapter(self, adapter: Any) -> None:
        """Loads an adapter before its first request: one that fails to load in a step ends the engine.

        Raises:
            ValueError: it does not load, or its number is another adapter's.
        """
        known = self._adapters.get(adapter.lora_int_id)
        wanted = (adapter.lora_name, adapter.lora_path)
        if known == wanted or self._llm.vllm_config.lora_config is None:  # vLLM refuses the latter itself
            return
        if known is not None:
            raise ValueError(f"adapter {wanted} has the number of {known}")
        try:
            await self._llm.add_lora(adapter)
        except Exception as error:
            if self.dead:
                raise WorkerLost("the engine process died") from error
            raise ValueError(f"adapter {adapter.lora_name!r} does not load: {error}") from error
        self._adapters[adapter.lora_int_id] = wanted

    async def release_kv(self, request_ids: Sequence[str]) -> None:
        await self._call("baton_release_kv", list(request_ids))

    async def settle(self) -> None:
        # Aborts and calls reach the engine process through one queue, in order.
        await self._call("baton_settle")

    async def renew_kv(self, engine_request_ids: Sequence[str], lease_s: float) -> Mapping[str, float]:
        by_rank = await self._call("baton_renew_kv", list(engine_request_ids), lease_s)
        return {
            request_id: min(ends[request_id] for ends in by_rank)
            for request_id in engine_request_ids
            if all(request_id in ends for ends in by_rank)
        }

    async def extend_kv_deadline(self, request_id: str, deadline_s: float) -> None:
        await self._call("baton_extend_kv_deadline", request_id, deadline_s)

    async def connect_kv(self, peer: KvParams) -> None:
        await self._call("baton_connect_kv", peer)

    async def disconnect_kv(self, incarnations: Sequence[str]) -> int:
        return max(await self._call("baton_disconnect_kv", list(incarnations)))

    async def _call(self, method: str, *args: Any) -> Any:
        """Calls our extension in the engine's processes; an engine that died answers nothing."""
        try:
            return await asyncio.wait_for(self._llm.collective_rpc(method, args=args), _CALL_TIMEOUT_S)
        except Exception as error:
            raise WorkerLost(f"the engine did not answer {method}: {error!r}") from error

    async def shutdown(self, timeout_s: float) -> None:
        await asyncio.get_running_loop().run_in_executor(self._starter, self._llm.shutdown, timeout_s)
        # vLLM shuts down once more when the object goes, which may be while the interpreter exits.
        self._llm.shutdown = lambda: None
        if self._events is not None:
            self._events.close()
        self._starter.shutdown(wait=False)


class _StartProgress:
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
class _LoadGauge:
    """The scheduler's latest statistics."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_pinned: int = 0
    num_expired_leases: int = 0
    steps: StepSample = field(default_factory=StepSample)


def _build(
    spec: VllmEngineSpec, events: KvEventReader | None, progress: _StartProgress
) -> tuple[Any, EngineInfo, _LoadGauge]:
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
    gauge = _LoadGauge()
    progress.next("engine")
    llm = AsyncLLM.from_vllm_config(config, stat_loggers=[_gauge_logger(gauge, spec)])
    progress.next("ready")
    return llm, _info(spec, llm.vllm_config, progress), gauge


def _info(spec: VllmEngineSpec, config: Any, progress: _StartProgress) -> EngineInfo:
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


def _gauge_logger(gauge: _LoadGauge, spec: VllmEngineSpec) -> Any:
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
