"""An engine without a model: core's worker model in real time, for tests of scale and timing.

It batches, queues, caches, pins, pulls and fails like an engine of the configured speed, and emits
tokens that depend on everything in front of them (see ``engine/mock_tokens.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from core.errors import WorkerLost
from core.observed_steps import SampledStepTime, StepObservation
from core.performance_model import H200_LLAMA_8B_FP8, KvLink, ScaledStepTime, StepTime
from core.types import WorkerLoad
from core.worker_events import Finished, SequenceSpec, Step, StepResult, WorkerModelConfig
from core.worker_model import WorkerModel
from engine import mock_kv
from engine.base import EngineDelta, EngineInfo, EngineRequest, KvParams
from engine.mock_pulls import MockPulls
from engine.mock_stream import MockStream
from engine.mock_tokens import TokenSource, block_states

_MAX_LAG_S = 0.1
_MAX_SLEEP_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MockEngineConfig:
    """What a mock engine pretends to be."""

    incarnation: str
    model: str = "mock"
    worker: WorkerModelConfig = field(default_factory=lambda: WorkerModelConfig(num_kv_blocks=50_000))
    step_time: StepTime = H200_LLAMA_8B_FP8
    link: KvLink = field(default_factory=lambda: KvLink(latency_s=0.002, bytes_per_s=25e9))
    kv_bytes_per_token: int = 65_536
    max_model_len: int = 131_072
    tp_size: int = 1
    token_ids: tuple[int, int] = (1_000, 30_000)
    """Emitted token ids: the least, and one above the greatest."""
    time_scale: float = 1.0
    """Stretches steps and transfers, not leases. 0: steps are free and run while a consumer waits."""
    decode_steps_per_wake: int = 1
    """With ``time_scale`` 0: decode steps run, and tokens delivered, at once."""
    on_pulled: Callable[[KvParams], None] | None = None
    """Told the KV parameters of a request whose remote blocks are not needed any more, as a real
    puller tells the prefill engine."""


class MockEngine:
    """A mock of :class:`engine.base.Engine`; make it on the event loop that it is to run on."""

    def __init__(self, config: MockEngineConfig) -> None:
        self._config = config
        self._step_time = SampledStepTime(
            ScaledStepTime(step_time=config.step_time, factor=config.time_scale)
        )
        self._model = WorkerModel(config.worker, self._step_time)
        self._streams: dict[str, MockStream] = {}
        self._pulls = MockPulls(
            link=config.link,
            time_scale=config.time_scale,
            bytes_per_token=config.kv_bytes_per_token,
            on_end=self._on_pull_end,
            on_pulled=config.on_pulled,
        )
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"mock-engine-{config.incarnation}")

    # ---------------------------------------------------------------------------- engine interface

    @property
    def info(self) -> EngineInfo:
        config, worker = self._config, self._config.worker
        return EngineInfo(
            incarnation=config.incarnation,
            model=config.model,
            block_size_tokens=worker.block_size_tokens,
            num_kv_blocks=worker.num_kv_blocks,
            bytes_per_block=config.kv_bytes_per_token * worker.block_size_tokens,
            max_model_len=config.max_model_len,
            max_num_seqs=worker.max_num_seqs,
            max_num_batched_tokens=worker.max_num_batched_tokens,
            tp_size=config.tp_size,
            kv_layout="mock",
        )

    @property
    def dead(self) -> bool:
        return self._model.dead

    @property
    def cache_log(self) -> None:
        """The worker model names its cached blocks, but does not tell when they come and go."""
        return None

    def load(self) -> WorkerLoad:
        return self._model.load(self._now_s())

    def take_steps(self) -> tuple[StepObservation, ...]:
        return self._step_time.steps.take()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        stream = self._open(request)
        try:
            while True:
                delta = await stream.next_delta()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            if self._streams.get(request.request_id) is stream:
                del self._streams[request.request_id]
                self._model.abort(self._now_s(), request.request_id)
                self._wake.set()

    async def release_kv(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._model.release(self._now_s(), request_id)
        self._wake.set()

    async def settle(self) -> None:
        """Mock aborts take effect at once."""

    async def renew_kv(self, engine_request_ids: Sequence[str], lease_s: float) -> Mapping[str, float]:
        now_s = self._now_s()
        ends_s = {
            request_id: self._model.renew(now_s, request_id, lease_s) for request_id in engine_request_ids
        }
        return {request_id: end_s for request_id, end_s in ends_s.items() if end_s is not None}

    async def extend_kv_deadline(self, request_id: str, deadline_s: float) -> None:
        if (stream := self._streams.get(request_id)) is not None:
            stream.kv_deadline_s = max(stream.kv_deadline_s, deadline_s)

    async def connect_kv(self, peer: KvParams) -> None:
        """Mock links need no connection."""

    async def disconnect_kv(self, incarnations: Sequence[str]) -> int:
        """Nothing is kept for a peer."""
        return 0

    async def shutdown(self, timeout_s: float) -> None:
        """Finishes what it has, for at most ``timeout_s``, pinned KV included; then it is dead."""
        if not self.dead:
            self._model.set_draining(self._now_s(), True)
            self._drained.clear()
            self._wake.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._drained.wait()
        self.kill()
        await asyncio.wait([self._task])

    # --------------------------------------------------------------------------- failure on demand

    def kill(self) -> None:
        """The engine dies with all it holds."""
        self._die()
        self._task.cancel()

    def hang(self, duration_s: float) -> None:
        """No step ends for ``duration_s``; requests are still taken in."""
        self._model.stall(self._now_s(), duration_s)
        self._wake.set()

    def fail_next_pull(self) -> None:
        """The next pull to begin, or one more after those announced before, ends without its KV."""
        self._pulls.fail_next()

    # --------------------------------------------------------------------------------------- loop

    async def _run(self) -> None:
        try:
            start_s = time.monotonic()
            while True:
                step = self._plan(start_s)
                if step is None:
                    await self._sleep_until_woken()
                    start_s = time.monotonic()
                    continue
                end_s = await self._sleep_through_step()
                self._deliver(self._model.finish_step(end_s))
                start_s = self._next_start_s(end_s)
        finally:
            self._die()

    def _plan(self, start_s: float) -> Step | None:
        self._model.expire_leases(start_s)
        if self._model.drained:
            self._drained.set()
        if self._config.time_scale > 0:
            plan = self._model.plan_step(start_s)
        elif any(stream.asking for stream in self._streams.values()):
            plan = self._model.plan_step(start_s, self._config.decode_steps_per_wake)
        else:
            return None
        for pull in plan.pulls:
            self._pulls.begin(self._streams[pull.request_id], pull.num_tokens)
        for request_id in plan.unneeded_pulls:
            self._pulls.skip(self._streams[request_id])
        return plan.step

    async def _sleep_until_woken(self) -> None:
        deadline_s = self._model.next_deadline_s()
        delay_s = _MAX_SLEEP_S if deadline_s is None else deadline_s - time.monotonic()
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(delay_s, _MAX_SLEEP_S)):
                await self._wake.wait()

    async def _sleep_through_step(self) -> float:
        """Returns when the step in flight ended; a hang may move its end while this sleeps."""
        delay_s = 0.0
        while True:
            await asyncio.sleep(min(max(delay_s, 0.0), _MAX_SLEEP_S))
            assert self._model.step is not None
            end_s = self._model.step.end_s
            delay_s = end_s - time.monotonic()
            if delay_s <= 0:
                return end_s

    def _next_start_s(self, end_s: float) -> float:
        """Steps follow each other without a gap, though timers fire late and delivery takes time."""
        now_s = time.monotonic()
        behind = self._config.time_scale == 0 or now_s - end_s > _MAX_LAG_S
        return now_s if behind else end_s

    def _now_s(self) -> float:
        """The model's time: events that come while a step is overdue count as in time for its end."""
        now_s = time.monotonic()
        step = self._model.step
        return now_s if step is None else min(now_s, step.end_s)

    def _deliver(self, result: StepResult) -> None:
        streams = self._streams
        for first in result.prefilled:
            stream = streams[first.request_id]
            if not first.resumed:
                stream.begin(first)
            stream.push(1)
        num_steps = len(result.ends_s)
        for request_id in result.decoded:
            streams[request_id].push(num_steps)
        for finished in result.finished:
            self._finish(streams.pop(finished.request_id), finished)

    def _finish(self, stream: MockStream, finished: Finished) -> None:
        if finished.lease_end_s is not None:
            stream.kv_report |= mock_kv.pinned_params(
                incarnation=self._config.incarnation,
                request_id=finished.request_id,
                num_tokens=finished.pinned_tokens,
                tp_size=self._config.tp_size,
                lease_end_s=finished.lease_end_s,
            )
        stream.finish()

    def _die(self) -> None:
        self._model.fail(self._now_s())
        for stream in self._streams.values():
            stream.fail(WorkerLost("the engine died"))
        self._streams.clear()
        self._drained.set()

    # ---------------------------------------------------------------------------------- requests

    def _open(self, request: EngineRequest) -> MockStream:
        config, prompt = self._config, request.prompt_token_ids
        if len(prompt) >= config.max_model_len:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room in a context of {config.max_model_len}"
            )
        remote = mock_kv.remote_kv(request.kv_params)
        worker = config.worker
        self._model.submit(
            self._now_s(),
            SequenceSpec(
                request_id=request.request_id,
                num_prompt_tokens=len(prompt),
                max_tokens=min(request.max_tokens, config.max_model_len - len(prompt)),
                priority=request.priority,
                block_hashes=[
                    (request.options, state)
                    for state in block_states(prompt, worker.hash_block_tokens or worker.block_size_tokens)
                ],
                remote_tokens=0 if remote is None else min(remote.num_tokens, len(prompt)),
                keep_kv=mock_kv.asks_to_keep_kv(request.kv_params),
            ),
        )
        stream = MockStream(request, TokenSource(prompt, *config.token_ids), self._wake.set)
        if remote is not None:
            stream.kv_report = mock_kv.pull_report("recomputed", reason="misfit")
            stream.kv_deadline_s = remote.deadline_s
        self._streams[request.request_id] = stream
        self._wake.set()
        return stream

    def _on_pull_end(self, request_id: str, ok: bool) -> None:
        self._model.kv_arrived(self._now_s(), request_id, ok=ok)
        self._wake.set()
