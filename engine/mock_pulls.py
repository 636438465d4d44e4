"""KV pulls that move no bytes and take the time they would take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from core.performance_model import KvLink
from engine import mock_kv
from engine.base import KvParams
from engine.mock_stream import MockStream


class MockPulls:
    """The pulls of one mock engine.

    Args:
        link: what pulls go over.
        time_scale: stretches the time they take.
        bytes_per_token: KV size.
        on_end: told the request id of a pull that has ended, and whether it brought the KV.
        on_pulled: told the KV parameters of a request whose remote blocks are not needed any more.
    """

    def __init__(
        self,
        *,
        link: KvLink,
        time_scale: float,
        bytes_per_token: int,
        on_end: Callable[[str, bool], None],
        on_pulled: Callable[[KvParams], None] | None,
    ) -> None:
        self._link = link
        self._time_scale = time_scale
        self._bytes_per_token = bytes_per_token
        self._on_end = on_end
        self._on_pulled = on_pulled
        self._num_to_fail = 0

    def fail_next(self) -> None:
        self._num_to_fail += 1

    def begin(self, stream: MockStream, num_tokens: int) -> None:
        """Starts a pull; it ends on the event loop, whether or not the stream lives until then."""
        fails = self._num_to_fail > 0
        self._num_to_fail -= fails
        num_bytes = num_tokens * self._bytes_per_token
        pull_s = self._link.transfer_s(num_bytes) * self._time_scale
        asyncio.get_running_loop().call_later(pull_s, self._end, stream, fails, num_bytes, pull_s)

    def skip(self, stream: MockStream) -> None:
        """The engine's own cache holds what could be pulled."""
        stream.kv_report = mock_kv.pull_report("cached")
        self._tell_source(stream)

    def _end(self, stream: MockStream, fails: bool, num_bytes: int, pull_s: float) -> None:
        reason = "pull_failed" if fails else ""
        if not fails and time.monotonic() >= stream.kv_deadline_s:
            reason = "lease_over"
        if reason:
            stream.kv_report = mock_kv.pull_report("recomputed", reason=reason)
        else:
            stream.kv_report = mock_kv.pull_report("pulled", num_bytes=num_bytes, pull_s=pull_s)
        self._tell_source(stream)
        self._on_end(stream.request.request_id, not reason)

    def _tell_source(self, stream: MockStream) -> None:
        if self._on_pulled is not None and stream.request.kv_params is not None:
            self._on_pulled(stream.request.kv_params)
