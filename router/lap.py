"""One try at a request: through prefill, handoff and decode, as far as the workers carry it.

    Prefill ──> early first token? ──> Generate(handle) ──> deltas ... ──> finish
       │ refused, dead, late               │ refused, dead, silent
       └─> next prefill worker ─> local    └─> the lap is over; the relay begins another one

A handle is used once. Its blocks are freed as soon as they are pulled, long before the lease ends, so a
second pull could read another prompt's KV: the next lap prefills anew, mostly from a prefix cache.
"""

from __future__ import annotations

import asyncio
import logging

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens
from core.errors import RequestRefused, WorkerLost, WorkerSilent
from core.request import Path
from engine.base import EngineDelta
from engine.wire import delta_from_proto
from router.cluster_view import Member
from router.decode_attempt import GIVEN_UP, DecodeAttempt
from router.lap_context import LapContext
from router.placing import Placing
from router.relay_request import Emit, Handoff, RelayRequest
from router.retry_budget import Tries
from router.routing import NO_PREFILL_WORKER, Decision
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

_MOST_REFUSALS = 3
"""Prefill workers that refuse: then the decode worker does it."""
_RESERVE_SLACK_S = 0.05
"""How long a finished first token waits for the decode worker's promise before it goes the safe way."""


class Lap:
    """What it holds on which worker, and its next step.

    Args:
        request: what is left to do, with an id of its own.
        emit: gets every delta.
    """

    def __init__(
        self,
        context: LapContext,
        request: RelayRequest,
        trace: RequestTrace,
        placing: Placing,
        tries: Tries,
        emit: Emit,
    ) -> None:
        self._context = context
        self._request = request
        self.trace = trace
        self._placing = placing
        self._tries = tries
        self._emit = emit
        self._handoff: Handoff | None = None
        self._asked_at: Member | None = None
        """Where KV room was asked for; whether it was promised or not, it is given back."""
        self._reserved_at: Member | None = None
        """Where KV room was promised."""
        self._finished = False

    async def run(self, decision: Decision) -> None:
        """Returns when the last delta has been emitted.

        Raises:
            RequestRefused: the last worker did not take it.
            WorkerLost: the last worker died, fell silent or gave up.
            NoWorkerAvailable: nobody is left to go on with it.
            ValueError: no worker accepts such a request.
        """
        if self._request.path is Path.PREFILL_ONLY:
            await self._prefill_only(decision)
            return
        await self._prefill_remotely(decision)
        if not self._finished:
            await self._decode()

    @property
    def worker_id(self) -> str:
        """Where it ran last."""
        if self._request.path is Path.PREFILL_ONLY:
            return self.trace.prefill_worker
        return self.trace.decode_worker

    def give_back(self) -> None:
        """Frees what was pinned or reserved and never used."""
        background, handoff = self._context.background, self._handoff
        self._placing.give_back()
        if handoff is not None and not handoff.taken:
            background.start(handoff.release())
        if self._asked_at is not None:
            background.start(self._asked_at.link.abort(self._decode_id))

    # Prefill.

    async def _prefill_only(self, decision: Decision) -> None:
        self.trace.prefill_worker = decision.prefill_worker or ""
        leg = local_leg(self._request.params)
        reply = await self._prefill(self._member(self.trace.prefill_worker), leg, keep_kv=False)
        self._emit(delta_from_proto(reply.delta))

    async def _prefill_remotely(self, decision: Decision) -> None:
        """Tries prefill workers; without a handoff afterwards, the decode worker prefills by itself."""
        while True:
            self.trace.decode_worker = decision.decode_worker
            if decision.prefill_worker is None:
                if decision.reason == NO_PREFILL_WORKER:
                    self._note_fallback(NO_PREFILL_WORKER, "", "no prefill worker is available")
                return
            worker_id = self.trace.prefill_worker = decision.prefill_worker
            try:
                await self._prefill_and_reserve(worker_id, decision.decode_worker)
                return
            except WorkerLost as error:
                again = self._tries.failed(worker_id, silent=isinstance(error, WorkerSilent))
                self._note_fallback("prefill_retry", worker_id, str(error))
            except RequestRefused as refusal:
                self._tries.refused(worker_id)
                again = self._tries.num_refusals <= _MOST_REFUSALS
                self._note_fallback("prefill_retry", worker_id, str(refusal))
            if not again:
                self._note_fallback("local_prefill", "", "too many prefill workers failed")
                return
            decision = self._placing.choose(self._tries.excluded)

    async def _prefill_and_reserve(self, prefill_id: str, decode_id: str) -> None:
        """One prefill leg, with KV room on the decode worker asked for meanwhile."""
        request = self._request
        early = request.path is Path.REMOTE_EARLY
        leg = early_prefill_leg(request.params) if early else kv_only_prefill_leg()
        member = self._member(prefill_id)
        reserving = None
        decode = self._context.view.member(decode_id)
        if early and decode is not None and self._asked_at is None:  # one promise is given back
            reserving = asyncio.create_task(self._reserve(decode))
        try:
            reply = await self._prefill(member, leg, keep_kv=True)
            delta = delta_from_proto(reply.delta)
            if reply.HasField("kv_handle"):
                self._handoff = Handoff(
                    prefill=member,
                    request_id=self._placing.prefill_id,
                    kv_handle=reply.kv_handle,
                    cached_tokens=delta.num_cached_tokens or 0,
                    cache_creation_tokens=delta.num_cache_creation_tokens or 0,
                )
            early = early and not reply.first_token_void
            if early and delta.finish_reason != "length":  # the answer is one token long
                self._finished = True
                self._emit(delta)
                return
            if reserving is not None:
                await asyncio.wait((reserving,), timeout=_RESERVE_SLACK_S)
        finally:
            if reserving is not None:
                reserving.cancel()
        promised = self._reserved_at is not None and self._reserved_at is self._decode_worker()
        if early and self._handoff is not None and promised:
            self._handoff.first_token = delta
            self._emit(
                EngineDelta(
                    token_ids=delta.token_ids,
                    logprobs=delta.logprobs,
                    num_cached_tokens=delta.num_cached_tokens,
                    num_cache_creation_tokens=delta.num_cache_creation_tokens,
                )
            )

    async def _prefill(self, member: Member, leg: LegParams, *, keep_kv: bool) -> worker_pb2.PrefillReply:
        request, trace, context = self._request, self.trace, self._context
        message = request.leg_message(self._placing.prefill_id, leg, request.prompt_token_ids)
        trace.prefill_sent_at_s = context.clock.now_s()
        try:
            reply = await member.link.prefill(
                message, keep_kv=keep_kv, timeout_s=context.config.prefill_timeout_s
            )
            if reply.delta.finish_reason in GIVEN_UP:
                raise WorkerLost(f"the engine ended a prefill with {reply.delta.finish_reason!r}")
        except (asyncio.CancelledError, WorkerLost) as error:
            if isinstance(error, WorkerLost):
                member.breaker.failed()
            if keep_kv:  # the answer may have crossed the cancellation
                context.background.start(member.link.release([message.request_id]))
            raise
        finally:
            self._placing.prefill_ended()
        member.breaker.succeeded()
        trace.prefill_done_at_s = context.clock.now_s()
        trace.prefill_queue_s, trace.prefill_s = reply.delta.queue_s, reply.delta.prefill_s
        trace.cached_tokens = reply.delta.num_cached_tokens
        return reply

    async def _reserve(self, member: Member) -> None:
        self._asked_at = member
        if await member.link.reserve(self._decode_id, len(self._request.prompt_token_ids) + 1):
            self._reserved_at = member

    # Decode.

    async def _decode(self) -> None:
        request, handoff = self._request, self._handoff
        prompt, leg = request.prompt_token_ids, local_leg(request.params)
        if handoff is not None and handoff.first_token is not None:
            prompt = [*prompt, *handoff.first_token.token_ids]
            leg = after_first_token_leg(request.params)
            self.trace.path = Path.REMOTE_EARLY
        else:
            self.trace.path = Path.LOCAL if handoff is None else Path.REMOTE
        member = self._member(self.trace.decode_worker)
        message = worker_pb2.GenerateRequest(request=request.leg_message(self._decode_id, leg, prompt))
        message.request.replay_token_ids = pack_tokens(request.replay_token_ids)
        if handoff is not None:
            handoff.taken = True
            message.kv_handle.CopyFrom(handoff.kv_handle)
        if member is self._asked_at:
            self._asked_at = None  # the leg uses the promise up
        attempt = DecodeAttempt(self._context, member, self.trace, handoff, self._emit)
        self._placing.decode_sent(member, prefills=handoff is None)
        await attempt.run(message)

    # Shared.

    @property
    def _decode_id(self) -> str:
        return f"{self._request.request_id}.d"

    def _decode_worker(self) -> Member | None:
        return self._context.view.member(self.trace.decode_worker)

    def _member(self, worker_id: str) -> Member:
        member = self._context.view.member(worker_id)
        if member is None:
            raise WorkerLost(f"worker {worker_id} left the cluster")
        return member

    def _note_fallback(self, fallback: str, worker_id: str, why: str) -> None:
        note_fallback(self.trace, fallback, worker_id, why)


def note_fallback(trace: RequestTrace, fallback: str, worker_id: str, why: str) -> None:
    """Puts down, in trace and log, that a request went on another way."""
    trace.fallbacks = (*trace.fallbacks, fallback)
    logger.warning(
        "fallback",
        extra=fields(request_id=trace.request_id, fallback=fallback, worker=worker_id, reason=why),
    )
