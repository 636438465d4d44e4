"""One request under way: lap after lap until it is answered.

A lap that loses its worker is followed by another one, for what is left of the answer then: the client
sees a pause, not a seam. Work that has begun is not given up lightly: if nobody with the right role is
left, any worker will do, and if there is none, one is waited for.
"""

from __future__ import annotations

import asyncio

from core.errors import BatonError, NoWorkerAvailable, RequestRefused, WorkerLost
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

_LOOK_AGAIN_S = 0.1


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
        self._num_retries = 0

    async def run(self) -> None:
        """See :meth:`router.relay.Relay.run`."""
        placing = Placing(self._request, self._trace, self._placing_context)
        decision = placing.choose(()) if self._gate is None else await self._gate.enter(placing)
        lap = self._lap(self._request, self._trace, placing, self._first_emit(placing))
        while True:
            try:
                await lap.run(decision)
                break
            except (RequestRefused, WorkerLost, NoWorkerAvailable) as error:
                self._check_again(lap, error)
                lost = error
            finally:
                lap.give_back()
            lap, decision = await self._next_lap(lap, placing.revision, lost)
        if self._gate is not None and (tpot_s := self._trace.tpot_s) is not None:
            self._gate.finished(tpot_s, self._request.tpot_slo_s, self._trace.output_tokens)

    def _first_emit(self, placing: Placing) -> Emit:
        """Tells admission control how the first token turned out."""
        gate, predicted_ttft_s, trace = self._gate, placing.predicted_ttft_s, self._trace
        if gate is None or predicted_ttft_s is None:
            return self._answer.emit

        def emit(delta: EngineDelta) -> None:
            if not self._answer.token_ids and not trace.fallbacks:
                gate.answered(predicted_ttft_s, self._context.clock.now_s() - trace.received_at_s)
            self._answer.emit(delta)

        return emit

    def _lap(self, request: RelayRequest, trace: RequestTrace, placing: Placing, emit: Emit) -> Lap:
        return Lap(self._context, request, trace, placing, self._tries, emit)

    # Another lap.

    def _check_again(self, lap: Lap, error: BatonError) -> None:
        """
        Raises:
            WorkerLost: the answer has begun and may not or cannot be taken up.
            NoWorkerAvailable: it has not begun and may not be begun anew.
        """
        if isinstance(error, RequestRefused):
            granted = self._tries.refused(lap.worker_id)
        elif isinstance(error, WorkerLost):
            granted = self._tries.failed(lap.worker_id)
        else:
            granted = True  # a prefill worker was lost before, which counted
        why_not = "" if granted else "it was begun anew too often"
        if self._answer.token_ids:
            why_not = why_not or cannot_resume(self._request, replays=self._context.config.replays)
        if not why_not:
            return
        message = f"{error}; the request does not go on elsewhere: {why_not}"
        if self._answer.token_ids:
            raise WorkerLost(message) from error
        raise NoWorkerAvailable(message) from error

    async def _next_lap(self, lost: Lap, revision: str | None, error: BatonError) -> tuple[Lap, Decision]:
        answer, trace, clock = self._answer, self._trace, self._context.clock
        self._num_retries += 1
        sent = tuple(answer.token_ids)
        rest = rest_of(self._request, sent, self._num_retries)
        emit: Emit = answer.emit
        if sent:
            resumption = Resumption(
                lost_worker=lost.worker_id,
                num_tokens=len(sent),
                replayed=bool(rest.replay_token_ids),
                lost_at_s=clock.now_s(),
            )
            trace.resumptions.append(resumption)
            emit = RestEmit(answer, rest.replay_token_ids, resumption, clock)
        note_fallback(trace, RESUMED if sent else RESTARTED, lost.worker_id, str(error))
        rest_trace = trace.of_rest(clock.now_s(), rest.path) if sent else trace
        placing = Placing(rest, rest_trace, self._placing_context, revision=revision)
        decision = await self._place_again(placing)
        if sent:
            trace.decode_worker = decision.decode_worker or decision.prefill_worker or ""
        return self._lap(rest, rest_trace, placing, emit), decision

    async def _place_again(self, placing: Placing) -> Decision:
        """
        Raises:
            NoWorkerAvailable: no worker came in time.
        """
        clock, tries = self._context.clock, self._tries
        give_up_at_s = clock.now_s() + self._context.config.resume_timeout_s
        while True:
            for choose in (placing.choose, placing.choose_any):
                try:
                    return choose(tries.excluded)
                except NoWorkerAvailable as error:
                    nobody = error
            if clock.now_s() >= give_up_at_s:
                raise nobody
            await asyncio.sleep(_LOOK_AGAIN_S)
            tries.forget_refusals()
