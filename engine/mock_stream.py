"""The way from the mock engine's loop to one consumer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from core.worker_events import Prefilled
from engine.base import EngineDelta, EngineRequest, KvParams
from engine.mock_tokens import TokenSource


class MockStream:
    """Counts tokens in, hands deltas out; a slow consumer gets several tokens in one delta.

    Args:
        request: what is asked for.
        tokens: what the request emits.
        on_ask: called when a consumer starts to wait for a token.
    """

    __slots__ = (
        "_error",
        "_finish_reason",
        "_first",
        "_num_ready",
        "_on_ask",
        "_tokens",
        "_waiter",
        "kv_deadline_s",
        "kv_report",
        "request",
    )

    def __init__(self, request: EngineRequest, tokens: TokenSource, on_ask: Callable[[], None]) -> None:
        self.request = request
        self.kv_report: KvParams = {}
        """KV transfer parameters for the last delta."""
        self.kv_deadline_s = float("inf")
        """Remote KV that comes later is not to be trusted; monotonic seconds."""
        self._tokens = tokens
        self._on_ask = on_ask
        self._num_ready = 0
        self._first: Prefilled | None = None
        self._finish_reason: str | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def asking(self) -> bool:
        """A consumer waits for a token."""
        return self._waiter is not None and not self._waiter.done()

    def begin(self, first: Prefilled) -> None:
        """The first token is about to come."""
        self._first = first

    def push(self, num_tokens: int) -> None:
        self._num_ready += num_tokens
        self._wake()

    def finish(self) -> None:
        """All tokens have been pushed."""
        self._finish_reason = "length"
        self._wake()

    def fail(self, error: Exception) -> None:
        """Ends the stream once its tokens are read."""
        self._error = error
        self._wake()

    async def next_delta(self) -> EngineDelta:
        """Waits for tokens.

        Raises:
            Exception: whatever ``fail`` was given.
        """
        while not self._num_ready and self._finish_reason is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            self._on_ask()
            try:
                await self._waiter
            finally:
                self._waiter = None
        token_ids = self._tokens.take(self._num_ready)
        self._num_ready = 0
        if self._first is None and self._finish_reason is None:
            return EngineDelta(token_ids=token_ids)
        first, self._first = self._first, None
        return EngineDelta(
            token_ids=token_ids,
            num_cached_tokens=None if first is None else first.num_cached_tokens,
            queue_s=None if first is None else first.queue_s,
            prefill_s=None if first is None else first.prefill_s,
            finish_reason=self._finish_reason,
            kv_params=(self.kv_report or None) if self._finish_reason else None,
        )

    def _wake(self) -> None:
        if self.asking:
            assert self._waiter is not None
            self._waiter.set_result(None)
