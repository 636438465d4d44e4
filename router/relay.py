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
import math
from dataclasses import dataclass
from typing import Any

from baton_proto import worker_pb2
from core.clock import Clock
from core.errors import BatonError, NoWorkerAvailable, RequestRefused, WorkerLost
from core.request import Path
from core.types import Role
from engine.base import EngineDelta
from engine.wire import delta_from_proto
from router.admission import AdmissionController
from router.admission_gate import AdmissionGate
from router.admission_limits import AdmissionLimits
from router.background import Background
from router.cluster_view import ClusterView, Member
from router.decode_attempt import DecodeAttempt
from router.placing import Placing, PlacingContext
from router.relay_request import Emit, Handoff, RelayRequest
from router.routing import NO_PREFILL_WORKER, Decision, RoutingPolicy
from router.sampling import (
    LegParams,
    after_first_token_leg,
    early_prefill_leg,
    kv_only_prefill_leg,
    local_leg,
)
from router.trace import RequestTrace
from router.traffic_counter import TrafficCounter
from telemetry.logs import fields

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
_RESERVE_SLACK_S = 0.05
"""How long a finished first token waits for the decode worker's promise before it goes the safe way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    prefill_timeout_s: float
    """A prefill leg that takes longer is given to another worker."""
    stall_timeout_s: float
    """A decode leg that is silent for longer counts as dead."""


class Relay:
    """Runs requests against the workers in a view.

    Args:
        limits: of the requests that wait here for room on the workers; None sends everything at once.
        tpot_slo_s: the model's target.
        traffic: told of each request when it is first sent.
    """

    def __init__(
        self,
        view: ClusterView,
        policy: RoutingPolicy,
        config: RelayConfig,
        clock: Clock,
        *,
        limits: AdmissionLimits | None = None,
        tpot_slo_s: float = math.inf,
        traffic: TrafficCounter | None = None,
    ) -> None:
        self.view = view
        self.config = config
        self.clock = clock
        self.background = Background()
        controller = AdmissionController(limits or AdmissionLimits(), clock)
        self.placing = PlacingContext(
            view=view,
            policy=policy,
            clock=clock,
            limits=limits or AdmissionLimits(),
            tpot_slo_s=tpot_slo_s,
            tpot_factor=controller.tpot_factor,
            traffic=traffic or TrafficCounter(""),
        )
        self.gate = None
        if limits is not None:
            self.gate = AdmissionGate(controller, clock)
            view.on_news = self.gate.news

    @property
    def num_waiting(self) -> int:
        """Requests that wait here for room on the workers."""
        return 0 if self.gate is None else self.gate.num_waiting

    @property
    def waiting_prompt_tokens(self) -> int:
        """Prompt tokens of the requests that wait here."""
        return 0 if self.gate is None else self.gate.waiting_prompt_tokens

    def check_available(self, model: str) -> None:
        """
        Raises:
            NoWorkerAvailable: no worker could decode a request now.
        """
        if not any(candidate.role is Role.DECODE for candidate in self.view.candidates(model)):
            raise NoWorkerAvailable(f"no decode worker serves {model} now")

    def explain(self, request: RelayRequest, trace: RequestTrace) -> dict[str, Any]:
        """What would be decided for a request now, and why; nothing is sent.

        Raises:
            NoWorkerAvailable: no worker can take the request now.
        """
        return Placing(request, trace, self.placing).what_if()

    async def run(self, request: RelayRequest, trace: RequestTrace, emit: Emit) -> None:
        """Relays one request; ``emit`` gets every delta, the last with a finish reason.

        Cancelling it aborts the request everywhere.

        Raises:
            Rejected: too much is waiting already; no work has been done.
            NoWorkerAvailable: no worker can take the request now.
            WorkerLost: a worker died after tokens had been emitted.
            ValueError: no worker accepts such a request.
        """
        lap = _Lap(self, request, trace, emit)
        try:
            await lap.run()
        finally:
            lap.give_back()


class _Lap:
    """One request under way: what it holds on which worker, and its next step."""

    def __init__(self, relay: Relay, request: RelayRequest, trace: RequestTrace, emit: Emit) -> None:
        self._relay = relay
        self._request = request
        self._trace = trace
        self._emit = emit if relay.gate is None else self._emit_first
        self._emit_rest = emit
        self._placing = Placing(request, trace, relay.placing)
        self._handoff: Handoff | None = None
        self._asked_at: Member | None = None
        """Where KV room was asked for; whether it was promised or not, it is given back."""
        self._reserved_at: Member | None = None
        """Where KV room was promised."""
        self._finished = False

    async def run(self) -> None:
        gate = self._relay.gate
        decision = self._placing.choose(()) if gate is None else await gate.enter(self._placing)
        if self._request.path is Path.PREFILL_ONLY:
            await self._prefill_only(decision)
            return
        await self._prefill_remotely(decision)
        if not self._finished:
            await self._decode()
        if gate is not None and (tpot_s := self._trace.tpot_s) is not None:
            gate.finished(tpot_s, self._request.tpot_slo_s, self._trace.output_tokens)

    def _emit_first(self, delta: EngineDelta) -> None:
        """Tells admission control how the first token turned out."""
        gate, predicted_ttft_s = self._relay.gate, self._placing.predicted_ttft_s
        if gate is not None and predicted_ttft_s is not None and not self._trace.fallbacks:
            gate.answered(predicted_ttft_s, self._relay.clock.now_s() - self._trace.received_at_s)
        self._emit = self._emit_rest
        self._emit(delta)

    def give_back(self) -> None:
        """Frees what was pinned or reserved and never used."""
        background, handoff = self._relay.background, self._handoff
        self._placing.give_back()
        if handoff is not None and not handoff.taken:
            background.start(handoff.release())
        if self._asked_at is not None:
            background.start(self._asked_at.link.abort(self._decode_id(0)))

    # Prefill.

    async def _prefill_only(self, decision: Decision) -> None:
        tried: list[str] = []
        while True:
            worker_id = self._trace.prefill_worker = decision.prefill_worker or ""
            try:
                leg = local_leg(self._request.params)
                reply = await self._prefill(self._member(worker_id), leg, keep_kv=False)
            except (RequestRefused, WorkerLost) as error:
                self._give_up_on(worker_id, "prefill_retry", tried, error)
                if len(tried) >= _MAX_ATTEMPTS:
                    raise NoWorkerAvailable(f"{len(tried)} workers failed, the last with: {error}") from error
                decision = self._placing.choose(tried)
                continue
            self._emit(delta_from_proto(reply.delta))
            return

    async def _prefill_remotely(self, decision: Decision) -> None:
        """Tries prefill workers; without a handoff afterwards, the decode worker prefills by itself."""
        tried: list[str] = []
        while True:
            self._trace.decode_worker = decision.decode_worker
            if decision.prefill_worker is None:
                if decision.reason == NO_PREFILL_WORKER:
                    self._note_fallback(NO_PREFILL_WORKER, "", "no prefill worker is available")
                return
            self._trace.prefill_worker = decision.prefill_worker
            try:
                await self._prefill_and_reserve(decision.prefill_worker, decision.decode_worker)
                return
            except (RequestRefused, WorkerLost) as error:
                self._give_up_on(decision.prefill_worker, "prefill_retry", tried, error)
            if len(tried) >= _MAX_ATTEMPTS:
                self._note_fallback("local_prefill", "", f"{len(tried)} prefill workers failed")
                return
            decision = self._placing.choose(tried)

    async def _prefill_and_reserve(self, prefill_id: str, decode_id: str) -> None:
        """One prefill leg, with KV room on the decode worker asked for meanwhile."""
        request = self._request
        early = request.path is Path.REMOTE_EARLY
        leg = early_prefill_leg(request.params) if early else kv_only_prefill_leg()
        member = self._member(prefill_id)
        reserving = None
        if early and self._asked_at is None:
            reserving = asyncio.create_task(self._reserve(self._member(decode_id)))
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
        request, trace, clock = self._request, self._trace, self._relay.clock
        message = request.leg_message(self._placing.prefill_id, leg, request.prompt_token_ids)
        trace.prefill_sent_at_s = clock.now_s()
        try:
            reply = await member.link.prefill(
                message, keep_kv=keep_kv, timeout_s=self._relay.config.prefill_timeout_s
            )
        except (asyncio.CancelledError, WorkerLost):
            if keep_kv:  # the answer may have crossed the cancellation
                self._relay.background.start(member.link.release([message.request_id]))
            raise
        finally:
            self._placing.prefill_ended()
        trace.prefill_done_at_s = clock.now_s()
        trace.prefill_queue_s, trace.prefill_s = reply.delta.queue_s, reply.delta.prefill_s
        trace.cached_tokens = reply.delta.num_cached_tokens
        return reply

    async def _reserve(self, member: Member) -> None:
        self._asked_at = member
        if await member.link.reserve(self._decode_id(0), len(self._request.prompt_token_ids) + 1):
            self._reserved_at = member

    # Decode.

    async def _decode(self) -> None:
        relay, request, handoff = self._relay, self._request, self._handoff
        prompt, leg = request.prompt_token_ids, local_leg(request.params)
        if handoff is not None and handoff.first_token is not None:
            prompt = [*prompt, *handoff.first_token.token_ids]
            leg = after_first_token_leg(request.params)
        else:
            self._trace.path = Path.LOCAL if handoff is None else Path.REMOTE
        tried: list[str] = []
        while True:
            member = self._decode_member(tried)
            message = worker_pb2.GenerateRequest(
                request=request.leg_message(self._decode_id(len(tried)), leg, prompt)
            )
            pulled_from = None
            if handoff is not None and not handoff.taken:
                handoff.taken, pulled_from = True, handoff
                message.kv_handle.CopyFrom(handoff.kv_handle)
            if member is self._asked_at and not tried:
                self._asked_at = None  # the leg uses the promise up
            attempt = DecodeAttempt(
                request,
                self._trace,
                handoff,
                lambda delta: self._emit(delta),
                relay.clock,
                relay.background,
                stall_timeout_s=relay.config.stall_timeout_s,
            )
            self._placing.decode_sent(member, prefills=pulled_from is None)
            try:
                await attempt.run(member, message, pulled_from)
                return
            except (RequestRefused, WorkerLost) as error:
                if attempt.started:
                    raise
                self._give_up_on(member.report.worker_id, "decode_retry", tried, error)
                if len(tried) >= _MAX_ATTEMPTS:
                    raise NoWorkerAvailable(f"{len(tried)} workers failed, the last with: {error}") from error

    def _decode_member(self, tried: list[str]) -> Member:
        """The worker chosen with the prefill worker, or another one."""
        member = self._decode_worker()
        if member is None or self._trace.decode_worker in tried:
            self._trace.decode_worker = self._placing.choose_decode(tried)
            member = self._member(self._trace.decode_worker)
        return member

    # Shared.

    def _decode_worker(self) -> Member | None:
        return self._relay.view.member(self._trace.decode_worker)

    def _decode_id(self, attempt: int) -> str:
        return f"{self._request.request_id}.d{attempt}"

    def _member(self, worker_id: str) -> Member:
        member = self._relay.view.member(worker_id)
        if member is None:
            raise WorkerLost(f"worker {worker_id} left the cluster")
        return member

    def _give_up_on(self, worker_id: str, reason: str, tried: list[str], error: BatonError) -> None:
        tried.append(worker_id)
        self._note_fallback(reason, worker_id, str(error))

    def _note_fallback(self, fallback: str, worker_id: str, why: str) -> None:
        self._trace.fallbacks = (*self._trace.fallbacks, fallback)
        logger.warning(
            "fallback",
            extra=fields(request_id=self._trace.request_id, fallback=fallback, worker=worker_id, reason=why),
        )
