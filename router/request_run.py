"""One request under way: lap after lap until it is answered.

A lap that loses its worker is followed by another one, for what is left of the answer then: the client
sees a pause, not a seam. Work that has begun is not given up lightly: if nobody with the right role is
left, any worker will do, and if there is none, one is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib

from core.errors import BatonError, NoWorkerAvailable, RequestRefused, WorkerLost, WorkerSilent
from engine.base import EngineDelta
from router.admission_gate import AdmissionGate
from router.lap import Lap, note_fallback
from router.lap_context import LapContext
from router.placing import Placing, PlacingContext
from router.relay_request import Emit, RelayRequest
from router.resume import Answer, RestEmit, cannot_resume, rest_of
from router.retry_budget import RetryBudget, Tries
from router.routing import Decision
from router.trace import RESTARTED, RESUMED, RequestTrace, Resumption

_MOST_REFUSALS = 16
"""Of a request that has no token yet."""
_LOOK_AGAIN_S = 0.1
_LONGEST_LOOK_AGAIN_S = 1.0
_GRACE_S = 0.3
"""A worker whose connection broke may be back by then; else any role will do."""
_SILENT_GRACE_S = 5.0
"""A worker that fell silent is asked again if nobody else has come by then."""


class RequestRun:
    """Runs once.

    Args:
        gate: where requests wait for room on the workers; None if they do not.
        emit: gets every delta, the last with a finish reason.
    """

    def __init__(
        self,
        context: LapContext,
        placing: PlacingContext,
        gate: AdmissionGate | None,
        budget: RetryBudget,
        request: RelayRequest,
        trace: RequestTrace,
        emit: Emit,
    ) -> None:
        self._context = context
        self._placing_context = placing
        self._gate = gate
        self._request = request
        self._trace = trace
        self._answer = Answer(emit)
        self._tries = Tries(budget, context.config.max_retries)
        self._placing = Placing(request, trace, placing)
        self._num_retries = 0
        self._trouble_since_s = 0.0
        """When it was lost, if it has got nowhere since."""
        self._look_again_s = _LOOK_AGAIN_S

    async def run(self) -> None:
        """See :meth:`router.relay.Relay.run`."""
        placing = self._placing
        try:
            decision = placing.choose(()) if self._gate is None else await self._gate.enter(placing)
        except BaseException:
            placing.give_back()  # it may have been let in just before
            raise
        lap = self._lap(self._request, self._trace, placing, self._first_emit(placing))
        while True:
            num_before = len(self._answer.token_ids)
            try:
                await lap.run(decision)
                break
            except (RequestRefused, WorkerLost, NoWorkerAvailable) as error:
                self._note_loss(lap, error, progressed=len(self._answer.token_ids) > num_before)
                lost = error
            finally:
                lap.give_back()
                if lap.trace is not self._trace:
                    self._trace.take_rest(lap.trace)
            lap, decision = await self._next_lap(lap, lost)
        whole = not self._trace.resumptions  # a pause says nothing of the workers' pace
        if self._gate is not None and whole and (tpot_s := self._trace.tpot_s) is not None:
            self._gate.lateness.finished(tpot_s, placing.aimed_tpot_s, self._trace.output_tokens)

    def _first_emit(self, placing: Placing) -> Emit:
        """Tells admission control how the first token turned out."""
        gate, predicted_ttft_s, trace = self._gate, placing.predicted_ttft_s, self._trace
        if gate is None or predicted_ttft_s is None:
            return self._answer.emit

        def emit(delta: EngineDelta) -> None:
            if not self._answer.token_ids and not trace.fallbacks:
                gate.lateness.answered(predicted_ttft_s, self._context.clock.now_s() - trace.received_at_s)
            self._answer.emit(delta)

        return emit

    def _lap(self, request: RelayRequest, trace: RequestTrace, placing: Placing, emit: Emit) -> Lap:
        return Lap(self._context, request, trace, placing, self._tries, emit)

    # Another lap.

    def _note_loss(self, lap: Lap, error: BatonError, *, progressed: bool) -> None:
        """
        Raises:
            WorkerLost: the answer has begun and may not or cannot be taken up.
            NoWorkerAvailable: it has not begun and may not be begun anew.
        """
        now_s, sent = self._context.clock.now_s(), bool(self._answer.token_ids)
        if progressed or not self._num_retries:
            self._trouble_since_s, self._look_again_s = now_s, _LOOK_AGAIN_S
        why_not = ""
        if isinstance(error, RequestRefused):
            self._tries.refused(lap.worker_id)
            if sent:
                too_often = now_s - self._trouble_since_s >= self._context.config.resume_timeout_s
            else:
                too_often = self._tries.num_refusals > _MOST_REFUSALS
            why_not = "no worker took it" if too_often else ""
        elif isinstance(error, WorkerLost):
            silent = isinstance(error, WorkerSilent)
            if not self._tries.failed(lap.worker_id, silent=silent, progressed=progressed):
                why_not = "it was begun anew too often"
        if sent:
            why_not = why_not or cannot_resume(self._request, replays=self._context.config.replays)
        if not why_not:
            return
        message = f"{error}; the request does not go on elsewhere: {why_not}"
        raise (WorkerLost(message) if sent else NoWorkerAvailable(message)) from error

    async def _next_lap(self, lost: Lap, error: BatonError) -> tuple[Lap, Decision]:
        answer, trace, clock = self._answer, self._trace, self._context.clock
        self._num_retries += 1
        sent = tuple(answer.token_ids)
        rest = rest_of(self._request, sent, self._num_retries)
        lost_worker = "" if isinstance(error, NoWorkerAvailable) else lost.worker_id
        note_fallback(trace, RESUMED if sent else RESTARTED, lost_worker, str(error))
        emit: Emit = answer.emit
        if sent:
            resumption = Resumption(
                lost_worker=lost_worker,
                num_tokens=len(sent),
                replayed=bool(rest.replay_token_ids),
                lost_at_s=self._trouble_since_s,
            )
            trace.resumptions.append(resumption)
            emit = RestEmit(answer, rest.replay_token_ids, resumption, clock)
            lap_trace = trace.of_rest(clock.now_s(), rest.path)
        else:
            lap_trace = trace
            trace.begin_again()
        # Weights bind an answer that has begun.
        revision = self._placing.revision if sent else None
        placing = self._placing = Placing(rest, lap_trace, self._placing_context, revision=revision)
        decision = await self._place_again(placing, any_role=bool(sent) or isinstance(error, WorkerLost))
        return self._lap(rest, lap_trace, placing, emit), decision

    async def _place_again(self, placing: Placing, *, any_role: bool) -> Decision:
        """
        Args:
            any_role: a prefill worker may decode if need be.

        Raises:
            NoWorkerAvailable: no worker came in time.
        """
        clock, tries = self._context.clock, self._tries
        began_s = clock.now_s()
        give_up_at_s = self._trouble_since_s + self._context.config.resume_timeout_s
        while True:
            try:
                return placing.choose(tries.excluded)
            except NoWorkerAvailable as error:
                nobody = error
            waited_s = clock.now_s() - began_s
            if any_role and waited_s >= _GRACE_S:
                with contextlib.suppress(NoWorkerAvailable):
                    return placing.choose_any(tries.excluded)
            if clock.now_s() >= give_up_at_s:
                raise nobody
            await asyncio.sleep(self._look_again_s)
            self._look_again_s = min(2 * self._look_again_s, _LONGEST_LOOK_AGAIN_S)
            if waited_s >= _GRACE_S or not any_role:
                tries.forgive(silent_too=waited_s >= _SILENT_GRACE_S)
