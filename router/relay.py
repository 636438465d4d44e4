"""The relay: one request's way through prefill, handoff and decode.

    choose pair ──> Prefill ──> early first token? ──> Generate(handle) ──> deltas ... ──> finish
         │             │ refused, dead, late                 │ refused, dead before its first token
         │             └─> next prefill worker ─> local      └─> next decode worker, prefilling itself
         └ local: Generate without a handle

A handle is used once. Its blocks are freed as soon as they are pulled, long before the lease ends, so
a second pull could read another prompt's KV: a second decode worker prefills by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm.sampling_params import SamplingParams

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens
from core.clock import Clock
from core.errors import BatonError, NoWorkerAvailable, RequestRefused, WorkerLost
from engine.base import EngineDelta
from engine.wire import delta_from_proto
from router.cluster_view import ClusterView, Member
from router.disaggregation import Path
from router.policy import LoadBalancingPolicy
from router.sampling import (
    LegParams,
    after_first_token_leg,
    early_prefill_leg,
    kv_only_prefill_leg,
    local_leg,
)
from router.trace import RequestTrace
from telemetry.logs import fields

logger = logging.getLogger(__name__)

Emit = Callable[[EngineDelta], None]
_MAX_ATTEMPTS = 3
_OUTCOMES = {
    worker_pb2.Transfer.PULLED: "pulled",
    worker_pb2.Transfer.CACHED: "cached",
    worker_pb2.Transfer.RECOMPUTED: "recomputed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayRequest:
    """One sequence to relay."""

    request_id: str
    """Minted by the router, unique over all routers; attempts add a suffix."""
    model: str
    adapter: str
    tenant: str
    prompt_token_ids: list[int]
    params: SamplingParams
    options: bytes
    """msgpack of engine arguments beside the sampling parameters."""
    path: Path
    priority: int = 0
    trace_headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    prefill_timeout_s: float
    """A prefill leg that takes longer is given to another worker."""


@dataclass(slots=True)
class _Handoff:
    """A finished prefill: what the decode leg starts from."""

    prefill: Member
    request_id: str
    kv_handle: worker_pb2.KvHandle
    cached_tokens: int
    first_token: EngineDelta | None
    """The token that was sent early, None if the decode leg samples it."""


class Relay:
    """Runs requests against the workers in a view; keeps no state between requests but a counter."""

    def __init__(
        self, view: ClusterView, policy: LoadBalancingPolicy, config: RelayConfig, clock: Clock
    ) -> None:
        self._view = view
        self._policy = policy
        self._config = config
        self._clock = clock
        self._cleanups: set[asyncio.Task[None]] = set()

    async def run(self, request: RelayRequest, trace: RequestTrace, emit: Emit) -> None:
        """Relays one request; ``emit`` gets every delta, the last with a finish reason.

        Cancelling it aborts the request everywhere.

        Raises:
            NoWorkerAvailable: nothing was emitted and no worker can take the request now.
            WorkerLost: a worker died after tokens had been emitted.
            ValueError: no worker accepts such a request.
        """
        if request.path is Path.PREFILL_ONLY:
            await self._prefill_only(request, trace, emit)
            return
        handoff = None
        if request.path is not Path.LOCAL:
            handoff, finished = await self._prefill_leg(request, trace, emit)
            if finished:
                return
        await self._decode_leg(request, trace, handoff, emit)

    # Prefill.

    async def _prefill_only(self, request: RelayRequest, trace: RequestTrace, emit: Emit) -> None:
        tried: list[str] = []
        while True:
            candidates = self._view.candidates(request.model)
            worker_id = self._policy.choose_prefill_only(candidates, tried)
            trace.prefill_worker = worker_id
            try:
                reply, _ = await self._prefill(
                    request, trace, worker_id, len(tried), local_leg(request.params), False
                )
            except (RequestRefused, WorkerLost) as error:
                self._note_fallback(trace, "prefill", worker_id, error)
                tried.append(worker_id)
                if len(tried) >= _MAX_ATTEMPTS:
                    raise NoWorkerAvailable(f"{len(tried)} workers failed, the last with: {error}") from error
                continue
            emit(delta_from_proto(reply.delta))
            return

    async def _prefill_leg(
        self, request: RelayRequest, trace: RequestTrace, emit: Emit
    ) -> tuple[_Handoff | None, bool]:
        """Tries prefill workers; (None, False) leaves the prefill to the decode worker."""
        tried: list[str] = []
        while len(tried) < _MAX_ATTEMPTS:
            candidates = self._view.candidates(request.model)
            decision = self._policy.choose(candidates, len(request.prompt_token_ids), tried)
            if decision.prefill_worker is None:
                self._note_fallback(trace, "local_prefill", "", NoWorkerAvailable(decision.reason))
                return None, False
            trace.prefill_worker, trace.decode_worker = decision.prefill_worker, decision.decode_worker
            try:
                return await self._prefill_and_reserve(
                    request, trace, decision.prefill_worker, decision.decode_worker, len(tried), emit
                )
            except (RequestRefused, WorkerLost) as error:
                self._note_fallback(trace, "prefill", decision.prefill_worker, error)
                tried.append(decision.prefill_worker)
        self._note_fallback(trace, "local_prefill", "", WorkerLost("too many prefill attempts"))
        return None, False

    async def _prefill_and_reserve(
        self,
        request: RelayRequest,
        trace: RequestTrace,
        prefill_id: str,
        decode_id: str,
        attempt: int,
        emit: Emit,
    ) -> tuple[_Handoff | None, bool]:
        early = request.path is Path.REMOTE_EARLY
        leg = early_prefill_leg(request.params) if early else kv_only_prefill_leg()
        reserving = asyncio.create_task(self._reserve(request, decode_id)) if early else None
        try:
            reply, prefill_request_id = await self._prefill(request, trace, prefill_id, attempt, leg, True)
            reserved = reserving is not None and await reserving
        finally:
            if reserving is not None:
                reserving.cancel()
        delta = delta_from_proto(reply.delta)
        if early and delta.finish_reason != "length":
            emit(delta)
            return None, True
        member = self._member(prefill_id)
        if not reply.HasField("kv_handle"):
            return None, False
        handoff = _Handoff(
            prefill=member,
            request_id=prefill_request_id,
            kv_handle=reply.kv_handle,
            cached_tokens=delta.num_cached_tokens or 0,
            first_token=None,
        )
        if reserved:
            handoff.first_token = delta
            self._emit_first_token(delta, trace, emit)
        return handoff, False

    def _emit_first_token(self, delta: EngineDelta, trace: RequestTrace, emit: Emit) -> None:
        emit(
            EngineDelta(
                token_ids=delta.token_ids,
                logprobs=delta.logprobs,
                num_cached_tokens=delta.num_cached_tokens,
            )
        )

    async def _prefill(
        self,
        request: RelayRequest,
        trace: RequestTrace,
        worker_id: str,
        attempt: int,
        leg: LegParams,
        keep_kv: bool,
    ) -> tuple[worker_pb2.PrefillReply, str]:
        member = self._member(worker_id)
        message = self._engine_request(
            request, f"{request.request_id}.p{attempt}", leg, request.prompt_token_ids
        )
        member.count(prefill_tokens=len(request.prompt_token_ids))
        trace.prefill_sent_at_s = self._clock.now_s()
        try:
            reply = await member.link.prefill(
                message, keep_kv=keep_kv, timeout_s=self._config.prefill_timeout_s
            )
        except (asyncio.CancelledError, WorkerLost):
            if keep_kv:  # the answer may have crossed the cancellation
                self._in_background(member.link.release([message.request_id]))
            raise
        trace.prefill_done_at_s = self._clock.now_s()
        trace.prefill_queue_s, trace.prefill_s = reply.delta.queue_s, reply.delta.prefill_s
        trace.cached_tokens = reply.delta.num_cached_tokens
        return reply, message.request_id

    async def _reserve(self, request: RelayRequest, decode_id: str) -> bool:
        member = self._view.member(decode_id)
        if member is None:
            return False
        return await member.link.reserve(f"{request.request_id}.d0", len(request.prompt_token_ids) + 1)

    # Decode.

    async def _decode_leg(
        self, request: RelayRequest, trace: RequestTrace, handoff: _Handoff | None, emit: Emit
    ) -> None:
        prompt, leg = request.prompt_token_ids, None
        if handoff is not None and handoff.first_token is not None:
            prompt = [*prompt, *handoff.first_token.token_ids]
            leg = after_first_token_leg(request.params)
        else:
            leg = local_leg(request.params)
        pulled_from = handoff
        tried: list[str] = []
        while True:
            worker_id = trace.decode_worker
            if not worker_id or worker_id in tried or self._view.member(worker_id) is None:
                candidates = self._view.candidates(request.model)
                worker_id = self._policy.choose(candidates, len(prompt), tried).decode_worker
                trace.decode_worker = worker_id
            message = worker_pb2.GenerateRequest(
                request=self._engine_request(request, f"{request.request_id}.d{len(tried)}", leg, prompt)
            )
            if pulled_from is not None:
                message.kv_handle.CopyFrom(pulled_from.kv_handle)
            attempt = _DecodeAttempt(self, request, trace, handoff, emit)
            try:
                await attempt.run(self._member(worker_id), message, pulled_from)
                return
            except (RequestRefused, WorkerLost) as error:
                if attempt.started:
                    raise
                self._note_fallback(trace, "decode", worker_id, error)
                tried.append(worker_id)
                pulled_from = None
                if len(tried) >= _MAX_ATTEMPTS:
                    raise NoWorkerAvailable(f"{len(tried)} workers failed, the last with: {error}") from error

    # Shared.

    def _member(self, worker_id: str) -> Member:
        member = self._view.member(worker_id)
        if member is None:
            raise WorkerLost(f"worker {worker_id} left the cluster")
        return member

    def _engine_request(
        self, request: RelayRequest, request_id: str, leg: LegParams, prompt: list[int]
    ) -> worker_pb2.EngineRequest:
        return worker_pb2.EngineRequest(
            request_id=request_id,
            model=request.model,
            adapter=request.adapter,
            tenant=request.tenant,
            prompt_token_ids=pack_tokens(prompt),
            max_tokens=leg.max_tokens,
            sampling_params=leg.encoded,
            options=request.options,
            priority=request.priority,
            trace_headers=request.trace_headers,
        )

    def _note_fallback(self, trace: RequestTrace, leg: str, worker_id: str, error: BatonError) -> None:
        trace.fallbacks = (*trace.fallbacks, leg)
        logger.warning(
            "fallback",
            extra=fields(request_id=trace.request_id, leg=leg, worker=worker_id, reason=str(error)),
        )

    def _in_background(self, work) -> None:
        """Clean-up that must outlive a cancelled request."""
        task = asyncio.create_task(work)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)


class _DecodeAttempt:
    """One decode leg on one worker: its deltas, its end, its clean-up."""

    def __init__(
        self, relay: Relay, request: RelayRequest, trace: RequestTrace, handoff: _Handoff | None, emit: Emit
    ) -> None:
        self._relay = relay
        self._request = request
        self._trace = trace
        self._handoff = handoff
        self._emit = emit
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = False

    async def run(
        self, member: Member, message: worker_pb2.GenerateRequest, pulled_from: _Handoff | None
    ) -> None:
        relay, link, request_id = self._relay, member.link, message.request.request_id
        finished = sent = False
        try:
            member.count(kv_tokens=len(self._request.prompt_token_ids))
            self._trace.handoff_sent_at_s = relay._clock.now_s()
            sent = True
            try:
                await link.generate(message, self._on_delta)
            except RequestRefused:
                sent = False
                raise
            await self._ended
            finished = True
        finally:
            link.forget(request_id)
            if not finished:
                relay._in_background(_clean_up(link, request_id if sent else None, pulled_from))
            elif pulled_from is not None and self._trace.kv_outcome == "recomputed":
                relay._in_background(pulled_from.prefill.link.release([pulled_from.request_id]))

    def _on_delta(self, message: worker_pb2.Delta) -> None:
        if self._ended.done():
            return
        if message.HasField("failure"):
            self._ended.set_exception(_failure_of(message.failure))
            return
        trace = self._trace
        delta = delta_from_proto(message)
        if not self.started:
            self.started = True
            trace.first_decode_at_s = self._relay._clock.now_s()
            trace.decode_queue_s = message.queue_s
            delta = self._first(delta)
        if message.HasField("transfer"):
            trace.kv_outcome = _OUTCOMES.get(message.transfer.outcome, "")
            trace.kv_reason = message.transfer.reason
            trace.kv_bytes, trace.kv_pull_s = message.transfer.num_bytes, message.transfer.pull_s
        self._emit(delta)
        if delta.finish_reason is not None:
            self._ended.set_result(None)

    def _first(self, delta: EngineDelta) -> EngineDelta:
        """Cached tokens are those of the worker that prefilled."""
        if self._handoff is None:
            self._trace.cached_tokens = delta.num_cached_tokens or 0
            return delta
        return EngineDelta(
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            prompt_logprobs=delta.prompt_logprobs,
            num_cached_tokens=self._handoff.cached_tokens,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )


async def _clean_up(link, request_id: str | None, pulled_from: _Handoff | None) -> None:
    """Ends a decode leg, then frees its KV at the source: in that order, or a pull could read freed blocks."""
    aborted = True if request_id is None else await link.abort(request_id)
    if pulled_from is not None and aborted:
        await pulled_from.prefill.link.release([pulled_from.request_id])


def _failure_of(failure: worker_pb2.Failure) -> Exception:
    if failure.kind == worker_pb2.Failure.INVALID_REQUEST:
        return ValueError(failure.message)
    return WorkerLost(failure.message)
