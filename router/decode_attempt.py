"""One decode leg on one worker: its deltas, its end, its clean-up."""

from __future__ import annotations

import asyncio

from baton_proto import worker_pb2
from core.clock import Clock
from core.errors import RequestRefused, WorkerLost
from engine.base import EngineDelta
from engine.wire import delta_from_proto
from router.background import Background
from router.cluster_view import Member
from router.relay_request import Emit, Handoff, RelayRequest
from router.trace import RequestTrace
from router.worker_link import WorkerLink

_OUTCOMES = {
    worker_pb2.Transfer.PULLED: "pulled",
    worker_pb2.Transfer.CACHED: "cached",
    worker_pb2.Transfer.RECOMPUTED: "recomputed",
}


class DecodeAttempt:
    """Runs once.

    Args:
        handoff: the prefill this leg goes on from; None if the worker prefills by itself.
        emit: gets every delta.
    """

    def __init__(
        self,
        request: RelayRequest,
        trace: RequestTrace,
        handoff: Handoff | None,
        emit: Emit,
        clock: Clock,
        background: Background,
        *,
        stall_timeout_s: float,
    ) -> None:
        self._request = request
        self._trace = trace
        self._handoff = handoff
        self._emit = emit
        self._clock = clock
        self._background = background
        self._stall_timeout_s = stall_timeout_s
        self._heard_at_s = clock.now_s()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = False
        """True once a delta of this leg was emitted."""

    async def run(
        self, member: Member, message: worker_pb2.GenerateRequest, pulled_from: Handoff | None
    ) -> None:
        """Returns when the last delta has been emitted.

        Args:
            pulled_from: the handoff whose KV handle is in ``message``, if one is.

        Raises:
            RequestRefused: the worker did not take it.
            WorkerLost: the worker died or gave up.
            ValueError: no worker would take it.
        """
        link, request_id = member.link, message.request.request_id
        finished = refused = False
        try:
            self._trace.handoff_sent_at_s = self._clock.now_s()
            try:
                await link.generate(message, self._on_delta)
            except RequestRefused:
                refused = True
                raise
            await self._wait_for_the_end()
            finished = True
        finally:
            link.forget(request_id)
            if not finished:
                self._background.start(_clean_up(link, None if refused else request_id, pulled_from))
            elif pulled_from is not None and self._trace.kv_outcome == "recomputed":
                self._background.start(pulled_from.release())

    async def _wait_for_the_end(self) -> None:
        while not self._ended.done():
            silent_s = self._clock.now_s() - self._heard_at_s
            if silent_s >= self._stall_timeout_s:
                raise WorkerLost(f"no token for {silent_s:.0f} s")
            await asyncio.wait((self._ended,), timeout=self._stall_timeout_s - silent_s)
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
        self._heard_at_s = self._clock.now_s()
        if not self.started:
            self.started = True
            trace.first_decode_at_s = self._heard_at_s
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
