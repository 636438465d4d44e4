"""One decode leg on one worker: its deltas, its end, its clean-up."""

from __future__ import annotations

import asyncio

from baton_proto import worker_pb2
from core.errors import RequestRefused, WorkerLost, WorkerSilent
from engine.base import EngineDelta
from engine.wire import delta_from_proto
from router.cluster_view import Member
from router.lap_context import LapContext
from router.relay_request import Emit, Handoff
from router.trace import RequestTrace
from router.worker_link import WorkerLink

_OUTCOMES = {
    worker_pb2.Transfer.PULLED: "pulled",
    worker_pb2.Transfer.CACHED: "cached",
    worker_pb2.Transfer.RECOMPUTED: "recomputed",
}
GIVEN_UP = ("abort", "error")
"""Finish reasons of an engine that did not finish."""


class DecodeAttempt:
    """Runs once.

    Args:
        handoff: the prefill this leg goes on from; None if the worker prefills by itself.
        emit: gets every delta.
    """

    def __init__(
        self,
        context: LapContext,
        member: Member,
        trace: RequestTrace,
        handoff: Handoff | None,
        emit: Emit,
    ) -> None:
        self._context = context
        self._member = member
        self._trace = trace
        self._handoff = handoff
        self._emit = emit
        self._heard_at_s = context.clock.now_s()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._started = False

    async def run(self, message: worker_pb2.GenerateRequest) -> None:
        """Returns when the last delta has been emitted.

        Args:
            message: with the handoff's KV handle, if there is one.

        Raises:
            RequestRefused: the worker did not take it.
            WorkerLost: the worker died, fell silent or gave up.
            ValueError: no worker would take it.
        """
        link, breaker, request_id = self._member.link, self._member.breaker, message.request.request_id
        background, handoff = self._context.background, self._handoff
        finished = refused = False
        try:
            self._trace.handoff_sent_at_s = self._context.clock.now_s()
            await link.generate(message, self._on_delta)
            await self._wait_for_the_end()
            finished = True
            breaker.succeeded()
        except RequestRefused:
            refused = True
            raise
        except WorkerLost:
            finished = self._ended.done() and self._ended.exception() is None
            if not finished:  # or the call was lost, and its answer was not
                breaker.failed()
                raise
        finally:
            link.forget(request_id)
            if not finished:
                background.start(_clean_up(link, None if refused else request_id, handoff))
            elif handoff is not None and self._trace.kv_outcome == "recomputed":
                background.start(handoff.release())

    async def _wait_for_the_end(self) -> None:
        config = self._context.config
        while not self._ended.done():
            silent_s = self._context.clock.now_s() - self._heard_at_s
            limit_s = config.stall_timeout_s if self._started else config.prefill_timeout_s
            if silent_s >= limit_s:
                raise WorkerSilent(f"no token for {silent_s:.0f} s")
            # The first token changes the limit while this waits.
            await asyncio.wait((self._ended,), timeout=min(limit_s - silent_s, config.stall_timeout_s))
        self._ended.result()

    def _on_delta(self, message: worker_pb2.Delta) -> None:
        """Called by the link's reader, which must survive whatever goes wrong here."""
        if self._ended.done():
            return
        try:
            self._take(message)
        except Exception as error:
            self._ended.set_exception(error)

    def _take(self, message: worker_pb2.Delta) -> None:
        if message.HasField("failure"):
            raise _failure_of(message.failure)
        trace = self._trace
        delta = delta_from_proto(message)
        self._heard_at_s = self._context.clock.now_s()
        if not self._started:
            self._started = True
            self._member.breaker.answered()
            trace.first_decode_at_s = self._heard_at_s
            trace.decode_queue_s = message.queue_s
            delta = self._first(delta)
        if message.HasField("transfer"):
            trace.kv_outcome = _OUTCOMES.get(message.transfer.outcome, "")
            trace.kv_reason = message.transfer.reason
            trace.kv_bytes, trace.kv_pull_s = message.transfer.num_bytes, message.transfer.pull_s
        if delta.finish_reason in GIVEN_UP:
            raise WorkerLost(f"the engine ended the request with {delta.finish_reason!r}")
        self._emit(delta)
        if delta.finish_reason is not None:
            self._ended.set_result(None)

    def _first(self, delta: EngineDelta) -> EngineDelta:
        """What was in a cache and what went into one is for the worker that prefilled to say."""
        if self._handoff is None:
            self._trace.cached_tokens = delta.num_cached_tokens or 0
            return delta
        return EngineDelta(
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            prompt_logprobs=delta.prompt_logprobs,
            num_cached_tokens=self._handoff.cached_tokens,
            num_cache_creation_tokens=self._handoff.cache_creation_tokens,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )


async def _clean_up(link: WorkerLink, request_id: str | None, pulled_from: Handoff | None) -> None:
    """Ends a decode leg, then frees its KV at the source.

    In that order, or a pull could read blocks that have been freed and given to another prompt. A worker
    that cannot be reached may still be pulling: then the lease decides when the blocks are free.
    """
    dropped = True if request_id is None else await link.abort(request_id)
    if pulled_from is not None and dropped:
        await pulled_from.release()


def _failure_of(failure: worker_pb2.Failure) -> Exception:
    if failure.kind == worker_pb2.Failure.INVALID_REQUEST:
        return ValueError(failure.message)
    return WorkerLost(failure.message)
