"""Clients that ask one thing after another, and what became of each request."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.faults.configuration import MODEL
from tests.faults.references import ANY, Case, References, text_of
from tests.integration.parity import complete, differences
from tests.integration.served import Answer

REQUEST_TIMEOUT_S = 90.0
_salts = itertools.count()


class Fate(enum.StrEnum):
    """How a request ended."""

    RIGHT = "right"
    WRONG = "wrong"
    """Something was answered that plain vLLM does not say, in whole or before it was cut."""
    REFUSED = "refused"
    """429 or 503 in place of an answer, before any work."""
    FAILED = "failed"
    """Any other error, or an answer without its end."""
    LEFT = "left"
    """The client went away, as it was told to."""


@dataclass(eq=False)
class Outcome:
    """One request. Times are seconds of the monotonic clock."""

    case: Case
    headers: dict[str, str] = field(default_factory=dict)
    began_s: float = field(default_factory=time.monotonic)
    heard_s: list[float] = field(default_factory=list)
    """When each piece of the answer came."""
    ended_s: float | None = None
    fate: Fate | None = None
    status: int = 0
    retry_after: str | None = None
    why: str = ""
    transport: bool = False
    """It failed on the connection, not by what was said on it."""
    request_id: str = ""

    @property
    def ttft_s(self) -> float | None:
        return self.heard_s[0] - self.began_s if self.heard_s else None

    def longest_silence_s(self, since_s: float) -> float:
        """The longest time without a piece of the answer, of those times that ended after ``since_s``."""
        moments = [self.began_s, *self.heard_s, self.ended_s or time.monotonic()]
        return max((b - a for a, b in itertools.pairwise(moments) if b > since_s), default=0.0)

    def __str__(self) -> str:
        return f"{self.fate} {self.case.kind} {self.request_id} status {self.status}: {self.why}"


class Load:
    """A number of clients; use as an asynchronous context manager.

    Args:
        kinds: of requests, mixed at random.
        fresh: share of requests that no cache may know the prompt of.
        accept: each of several sets of right answers; a request is right if one has its answer.
    """

    def __init__(
        self,
        url: str,
        references: References,
        *,
        clients: int = 6,
        kinds: Sequence[str] = ANY,
        fresh: float = 0.8,
        seed: object = 0,
        headers: dict[str, str] | None = None,
        pause_s: float = 0.0,
        accept: Sequence[References] = (),
    ) -> None:
        self._url = url
        self._cases = references.endless(kinds, seed)
        self._num_clients = clients
        self._fresh = fresh
        self._source = random.Random(f"load {seed}")
        self._headers = headers or {}
        self._pause_s = pause_s
        self._others = {
            (case.path, json.dumps(case.body)): case.expected for other in accept for case in other.cases
        }
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []
        self.outcomes: list[Outcome] = []
        """Of every request that has ended."""
        self.running: set[Outcome] = set()

    async def __aenter__(self) -> Load:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(
            base_url=self._url, timeout=REQUEST_TIMEOUT_S, limits=limits, headers=self._headers
        )
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(self._num_clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Lets every request end first."""
        await self.end()

    async def end(self) -> None:
        self._ending = True
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._client.aclose()

    async def _ask_on(self) -> None:
        while not self._ending:
            outcome = await self.ask(next(self._cases))
            if outcome.fate in (Fate.REFUSED, Fate.FAILED):
                await asyncio.sleep(0.2)
            await asyncio.sleep(self._pause_s)

    async def ask(
        self,
        case: Case,
        leave: Callable[[Outcome], Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Outcome:
        """One request; never raises for what the server does.

        Args:
            leave: awaited beside the request; when it returns, the client hangs up.
        """
        outcome = Outcome(case, headers=headers or {})
        self.running.add(outcome)
        try:
            asking = asyncio.create_task(self._ask(outcome))
            if leave is None:
                await asking
            else:
                leaving = asyncio.create_task(leave(outcome))
                await asyncio.wait((asking, leaving), return_when=asyncio.FIRST_COMPLETED)
                if not asking.done():
                    asking.cancel()
                    outcome.fate = Fate.LEFT
                leaving.cancel()
                await asyncio.gather(asking, leaving, return_exceptions=True)
        finally:
            outcome.ended_s = time.monotonic()
            self.running.discard(outcome)
            self.outcomes.append(outcome)
        return outcome

    async def _ask(self, outcome: Outcome) -> None:
        case = outcome.case
        body = {"model": MODEL, **case.body}
        if self._source.random() < self._fresh:
            body["cache_salt"] = f"{id(self)} {next(_salts)}"
        lines: list[str] = []
        try:
            async with self._client.stream("POST", case.path, json=body, headers=outcome.headers) as response:
                outcome.status = response.status_code
                outcome.retry_after = response.headers.get("retry-after")
                async for line in response.aiter_lines():
                    if line:
                        outcome.heard_s.append(time.monotonic())
                        lines.append(line)
        except (httpx.HTTPError, httpx.StreamError) as error:
            outcome.why, outcome.transport = repr(error), True
        self._judge(outcome, lines)

    def _judge(self, outcome: Outcome, lines: Sequence[str]) -> None:
        if outcome.status in (429, 503) and not outcome.why and _is_json(lines):  # not of HAProxy itself
            outcome.fate, outcome.why, outcome.heard_s = Fate.REFUSED, "".join(lines)[:300], []
            return
        if outcome.status != 200:
            outcome.fate, outcome.why = Fate.FAILED, outcome.why or "".join(lines)[:300]
            return
        case = outcome.case
        right = [case.expected]
        if self._others:
            right.append(self._others[case.path, json.dumps(case.body)])
        answer = _answer(case, lines)
        if answer is None:
            outcome.fate, outcome.why = Fate.FAILED, outcome.why or f"no whole answer: {lines!r:.300}"
            return
        outcome.request_id = answer.get("id") or ""
        found = [differences(answer, each) for each in right]
        if not all(found):
            outcome.fate = Fate.RIGHT
        elif error := answer.get("error") or outcome.why or (case.body.get("stream") and not answer["done"]):
            said = text_of(answer)
            cut_right = any(text_of(each).startswith(said) for each in right)
            outcome.fate = Fate.FAILED if cut_right else Fate.WRONG
            outcome.why = f"cut after {len(said)} characters: {error}"[:300]
        else:
            outcome.fate, outcome.why = Fate.WRONG, "; ".join(found[0])[:500]

    # What happened.

    def since(self, at_s: float) -> list[Outcome]:
        """Requests that ended after ``at_s``."""
        return [outcome for outcome in self.outcomes if (outcome.ended_s or 0) > at_s]

    def count(self, fate: Fate, since_s: float = 0.0) -> int:
        return Counter(outcome.fate for outcome in self.since(since_s))[fate]

    def streaming(self, num_pieces: int = 1) -> list[Outcome]:
        """Running requests whose client has so many pieces of the answer."""
        return [outcome for outcome in self.running if len(outcome.heard_s) >= num_pieces]

    async def wait_until(self, what: str, holds: Callable[[], Any], within_s: float = 30.0) -> Any:
        """Until ``holds()``, called in the event loop, is true; returns what it returned.

        Raises:
            AssertionError: it was not in time.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not (found := holds()):  # noqa: ASYNC110  conditions over what many tasks do
                    await asyncio.sleep(0.02)
                return found
        raise AssertionError(f"not within {within_s:g} s: {what}")


def _is_json(lines: Sequence[str]) -> bool:
    try:
        return isinstance(json.loads("".join(lines)), dict)
    except ValueError:
        return False


def _answer(case: Case, lines: Sequence[str]) -> Any:
    """Put together as the reference was; None for what is no answer at all."""
    try:
        if not case.body.get("stream"):
            return complete(Answer(200, json.loads("".join(lines))))
        data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
        done = bool(data) and data[-1] == "[DONE]"
        events = tuple(json.loads(item) for item in data if item != "[DONE]")
        return complete(Answer(200, None, events, done)) if events else None
    except ValueError:
        return None
