"""vLLM's AsyncLLM behind the engine interface."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from core.errors import StartupError, WorkerLost
from core.observed_steps import StepObservation
from core.types import WorkerLoad
from engine.base import EngineDelta, EngineInfo, EngineRequest, KvParams
from engine.cache_log import CacheLog
from engine.kv_events import KvEventReader
from engine.vllm_start import LoadGauge, StartProgress, VllmEngineSpec, build

_CALL_TIMEOUT_S = 10.0
_LOOK_S = 0.2
"""How often a call looks whether its engine still lives."""


class VllmEngine:
    """One vLLM engine; make it with :meth:`start`."""

    def __init__(
        self,
        llm: Any,
        info: EngineInfo,
        gauge: LoadGauge,
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
        progress = StartProgress()
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            events = KvEventReader() if spec.kv_events else None
            if events is not None:
                undo.callback(events.close)
            try:
                llm, info, gauge = await asyncio.wait_for(
                    loop.run_in_executor(starter, build, spec, events, progress), spec.startup_timeout_s
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
        """Calls our extension in the engine's processes; one that dies never answers."""
        answer = asyncio.ensure_future(self._llm.collective_rpc(method, args=args))
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                while not (await asyncio.wait([answer], timeout=_LOOK_S))[0]:
                    if self.dead:
                        raise WorkerLost("it died")
            return answer.result()
        except Exception as error:
            raise WorkerLost(f"the engine did not answer {method}: {error!r}") from error
        finally:
            answer.cancel()

    async def shutdown(self, timeout_s: float) -> None:
        await asyncio.get_running_loop().run_in_executor(self._starter, self._llm.shutdown, timeout_s)
        # vLLM shuts down once more when the object goes, which may be while the interpreter exits.
        self._llm.shutdown = lambda: None
        if self._events is not None:
            self._events.close()
        self._starter.shutdown(wait=False)
