"""Clients of any OpenAI server, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import enum
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.load import CHAT

HUNG_AFTER_S = 60.0


class Fate(enum.StrEnum):
    """How a request ended."""

    RIGHT = "right"
    WRONG = "wrong"
    """Something was said that one engine alone does not say, in whole or before the answer was cut."""
    FAILED = "failed"
    """An error, or an answer without its end."""
    HUNG = "hung"
    """No end within ``HUNG_AFTER_S``."""
    LEFT = "left"
    """The client hung up, as it was told to."""


@dataclass(frozen=True, slots=True)
class Said:
    """A whole answer."""

    text: str
    finish_reason: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Ask:
    """A chat request, with its right answer where that is known."""

    body: dict[str, Any]
    expected: Said | None = None


@dataclass(eq=False)
class Outcome:
    """One request. Times are seconds of the monotonic clock."""

    ask: Ask
    began_s: float = field(default_factory=time.monotonic)
    heard_s: list[float] = field(default_factory=list)
    """When each piece of a streamed answer came."""
    ended_s: float = 0.0
    fate: Fate | None = None
    why: str = ""
    """The error in a few words; empty if there was none."""
    said: Said | None = None

    @property
    def streams(self) -> bool:
        return bool(self.ask.body.get("stream"))


class FaultClient:
    """Sends requests, each on a connection of its own; use as an asynchronous context manager."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.running: set[Outcome] = set()

    async def __aenter__(self) -> FaultClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(base_url=self._url, timeout=None, limits=limits)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(
        self,
        ask: Ask,
        *,
        leave: Callable[[], Awaitable[object]] | None = None,
        timeout_s: float = HUNG_AFTER_S,
    ) -> Outcome:
        """One request; never raises for what the server does.

        Args:
            leave: awaited beside the request; when it returns, the client hangs up.
        """
        outcome = Outcome(ask)
        self.running.add(outcome)
        asking = asyncio.create_task(self._ask(outcome))
        others = [] if leave is None else [asyncio.ensure_future(leave())]
        try:
            await asyncio.wait((asking, *others), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                left = any(each.done() for each in others)
                outcome.fate = Fate.LEFT if left else Fate.HUNG
                outcome.why = "" if left else f"no end after {timeout_s:g} s"
        finally:
            for task in (asking, *others):
                task.cancel()
            await asyncio.gather(asking, *others, return_exceptions=True)
            outcome.ended_s = time.monotonic()
            self.running.discard(outcome)
        return outcome

    async def _ask(self, outcome: Outcome) -> None:
        lines: list[str] = []
        status, error = 0, ""
        try:
            async with self._client.stream("POST", CHAT, json=outcome.ask.body) as response:
                status = response.status_code
                async for line in response.aiter_lines():
                    if line:
                        lines.append(line)
                        outcome.heard_s.append(time.monotonic())
        except (httpx.HTTPError, httpx.StreamError) as transport_error:
            error = "connection cut" if status else f"no answer ({type(transport_error).__name__})"
        judge(outcome, status, lines, error)

    def num_streaming(self, num_pieces: int) -> int:
        """Running requests whose client has so many pieces of the answer."""
        return sum(len(outcome.heard_s) >= num_pieces for outcome in self.running)


def judge(outcome: Outcome, status: int, lines: Sequence[str], error: str) -> None:
    """Fills in what became of a request.

    Args:
        status: of HTTP; 0 if there was no answer.
        lines: of the body, as far as they came.
        error: of the connection; empty if there was none.
    """
    if not error and status != 200:
        error = f"HTTP {status}"
    text, reason, output_tokens, told = "", "", 0, ""
    if status == 200 and outcome.streams:
        text, reason, output_tokens, told = _read_stream(lines)
    elif status == 200 and not error:
        text, reason, output_tokens, told = _read_whole(lines)
    error = error or told
    expected = outcome.ask.expected
    outcome.said = Said(text, reason, output_tokens)
    if error:
        cut_right = expected is None or expected.text.startswith(text)
        outcome.fate = Fate.FAILED if cut_right else Fate.WRONG
        outcome.why = error
        if outcome.streams and status == 200:
            outcome.why += " in mid-stream" if text else " before a token"
    elif expected is None or outcome.said == expected:
        outcome.fate = Fate.RIGHT
    else:
        outcome.fate, outcome.why = Fate.WRONG, _difference(outcome.said, expected)


def _read_stream(lines: Sequence[str]) -> tuple[str, str, int, str]:
    """Text, finish reason, output tokens and the error of a stream."""
    text, reason, output_tokens, error = "", "", 0, ""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not data.startswith("{"):
            continue
        try:
            event = json.loads(data)
        except ValueError:
            return text, reason, output_tokens, "broken event"
        if "error" in event or event.get("object") == "error":
            error = "error event"
        if event.get("usage"):
            output_tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices") or ():
            text += (choice.get("delta") or {}).get("content") or ""
            reason = choice.get("finish_reason") or reason
    if not error and reason not in ("stop", "length"):
        error = f"finish reason {reason!r}" if reason else "end without finish reason"
    return text, reason, output_tokens, error


def _read_whole(lines: Sequence[str]) -> tuple[str, str, int, str]:
    try:
        answer = json.loads("".join(lines))
        (choice,) = answer["choices"]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"] or ""
        output_tokens = answer["usage"]["completion_tokens"]
    except (ValueError, KeyError, TypeError):
        return "", "", 0, "HTTP 200 without an answer"
    return text, reason, output_tokens, "" if reason in ("stop", "length") else f"finish reason {reason!r}"


def _difference(said: Said, expected: Said) -> str:
    if said.text != expected.text:
        same = next(
            (at for at, (a, b) in enumerate(zip(said.text, expected.text, strict=False)) if a != b),
            min(len(said.text), len(expected.text)),
        )
        return f"text differs after {same} of {len(expected.text)} characters"
    return (
        f"{said.output_tokens} tokens, {said.finish_reason}, with the text of {expected.output_tokens} tokens"
    )
