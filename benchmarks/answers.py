"""What a client saw of a request, read from the raw bytes of its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finished request; times are seconds on CLOCK_MONOTONIC, which all processes here share."""

    request_id: str = ""
    status: int
    sent_s: float
    end_s: float
    token_at_s: list[float] = field(default_factory=list)
    """When each event with content arrived: one token each, unless the sender fell behind."""
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.token_at_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.token_at_s[-1] - self.token_at_s[0]) / (self.output_tokens - 1)

    @property
    def largest_gap_s(self) -> float:
        return max(b - a for a, b in zip(self.token_at_s, self.token_at_s[1:], strict=False))


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """Bytes of one HTTP answer with their arrival times, header included."""

    sent_s: float
    chunks: Sequence[tuple[float, bytes]]

    def read(self) -> Answer:
        first_at_s, head = self.chunks[0]
        end_s = self.chunks[-1][0]
        status = int(head[9:12])
        if status != 200 or b"text/event-stream" not in head:
            return Answer(status=status, sent_s=self.sent_s, end_s=end_s, token_at_s=[first_at_s])
        events = list(_events(_bodies(self.chunks)))
        usage = next(event["usage"] for _, event in reversed(events) if event.get("usage"))
        return Answer(
            request_id=events[0][1]["id"],
            status=status,
            sent_s=self.sent_s,
            end_s=end_s,
            token_at_s=[at_s for at_s, event in events if _has_content(event)],
            prompt_tokens=usage["prompt_tokens"],
            output_tokens=usage["completion_tokens"],
        )


def _has_content(event: dict[str, Any]) -> bool:
    """True for tokens; false for the opening event with the role and for the usage at the end."""
    return any("role" not in choice.get("delta", {}) for choice in event["choices"])


def _bodies(chunks: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The body's bytes as they arrived, without the framing of HTTP's chunked encoding."""
    buffered = b""
    in_header, left = True, 0
    for at_s, data in chunks:
        buffered += data
        if in_header:
            _, _, buffered = buffered.partition(b"\r\n\r\n")
            in_header = False
        body = b""
        while buffered:
            if left == 0:
                size, found, rest = buffered.removeprefix(b"\r\n").partition(b"\r\n")
                if not found:
                    break
                left, buffered = int(size, 16), rest
                if left == 0:
                    buffered = b""
            taken, buffered = buffered[:left], buffered[left:]
            left -= len(taken)
            body += taken
        yield at_s, body


def _events(bodies: Iterator[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Arrival and content of each server-sent event; an event arrives with its last byte."""
    rest = b""
    for at_s, body in bodies:
        *whole, rest = (rest + body).split(b"\n\n")
        for text in whole:
            payload = text.removeprefix(b"data: ")
            if payload.startswith(b"{"):
                yield at_s, json.loads(payload)
