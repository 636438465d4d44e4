"""A load that turns from prompts to answers and back, sent to a running cluster, and what became of it.

Every request is greedy and has a cache salt of its own: its prompt is computed whole, however often it was
sent before, so that a few prompts whose answers are known serve for the whole load.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.model import NAME
from simulator.traces.trace import Trace, TraceRequest

PATH = "/v1/completions"
VOCABULARY = range(10, 2000)
NUM_PROMPTS_A_KIND = 24
_STATUS_EVERY_S = 0.2
_TRACE_WITHIN_S = 10.0
_REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of even load; lengths are uniform between two bounds, arrivals Poisson."""

    name: str
    seconds: float
    rate_rps: float
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt with the answer's length."""

    prompt: tuple[int, ...]
    output_tokens: int

    def body(self, **more: Any) -> dict[str, Any]:
        """Of a greedy request."""
        return {
            "model": NAME,
            "prompt": list(self.prompt),
            "max_tokens": self.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            **more,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """When which question is asked."""

    phases: tuple[Phase, ...]
    arrivals_s: tuple[float, ...]
    questions: tuple[Question, ...]
    """One an arrival."""

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def trace(self) -> Trace:
        """For the simulator: no prompt shares anything with another."""
        return Trace(
            name="planner-live",
            requests=tuple(
                TraceRequest(
                    arrival_s=at_s,
                    prompt_tokens=len(question.prompt),
                    output_tokens=question.output_tokens,
                )
                for at_s, question in zip(self.arrivals_s, self.questions, strict=True)
            ),
        )


def make_load(phases: Sequence[Phase], seed: int) -> Load:
    """Draws a load."""
    source = random.Random(seed)
    kinds = {phase.name: phase for phase in phases}
    drawn = {
        name: [_question(source, kind) for _ in range(NUM_PROMPTS_A_KIND)] for name, kind in kinds.items()
    }
    arrivals_s, questions = [], []
    start_s = 0.0
    for phase in phases:
        at_s = start_s + source.expovariate(phase.rate_rps)
        while at_s < start_s + phase.seconds:
            arrivals_s.append(at_s)
            questions.append(source.choice(drawn[phase.name]))
            at_s += source.expovariate(phase.rate_rps)
        start_s += phase.seconds
    return Load(phases=tuple(phases), arrivals_s=tuple(arrivals_s), questions=tuple(questions))


def _question(source: random.Random, phase: Phase) -> Question:
    return Question(
        prompt=tuple(source.choices(VOCABULARY, k=source.randint(*phase.prompt_tokens))),
        output_tokens=source.randint(*phase.output_tokens),
    )


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request as its client saw it, and its trace; times are seconds on the machine's monotonic clock."""

    sent_s: float
    num_tokens: int = 0
    first_s: float = float("nan")
    last_s: float = float("nan")
    text: str = ""
    error: str = ""
    """Why it failed, empty if it did not."""
    trace: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """nan with fewer than two tokens."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else float("nan")

    def meets(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether it was answered within both targets."""
        return not self.error and self.ttft_s <= ttft_s and not self.tpot_s > tpot_s


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSample:
    """Roles as the workers had them."""

    at_s: float
    num_prefill: int
    num_decode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of a load."""

    start_s: float
    """On the monotonic clock: arrivals count from here."""
    outcomes: tuple[Outcome, ...]
    """In the order of arrival."""
    splits: tuple[SplitSample, ...]


def replay(url: str, load: Load) -> Replayed:
    """Sends the load; returns when every request has ended."""
    return asyncio.run(_replay(url, load))


async def _replay(url: str, load: Load) -> Replayed:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=_REQUEST_TIMEOUT_S, limits=limits) as client:
        start_s = time.monotonic()
        splits: list[SplitSample] = []
        watch = asyncio.create_task(_watch(client, splits))
        try:
            asked = enumerate(zip(load.arrivals_s, load.questions, strict=True))
            outcomes = await asyncio.gather(
                *(_ask(client, start_s + at_s, question, number) for number, (at_s, question) in asked)
            )
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
    return Replayed(start_s=start_s, outcomes=tuple(outcomes), splits=tuple(splits))


async def _ask(client: httpx.AsyncClient, at_s: float, question: Question, number: int) -> Outcome:
    body = question.body(stream=True, stream_options={"include_usage": True}, cache_salt=f"{at_s}-{number}")
    await asyncio.sleep(at_s - time.monotonic())
    outcome = Outcome(sent_s=time.monotonic())
    try:
        request_id = await _stream(client, body, outcome)
        if outcome.num_tokens != question.output_tokens:
            outcome.error = f"{outcome.num_tokens} of {question.output_tokens} tokens"
        outcome.trace = await _trace(client, request_id)
    except (httpx.HTTPError, ValueError, LookupError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def _stream(client: httpx.AsyncClient, body: Mapping[str, Any], outcome: Outcome) -> str:
    """
    Raises:
        ValueError: it was refused, or the stream told of an error or broke off.
    """
    request_id, whole = "", False
    async with client.stream("POST", PATH, json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise ValueError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            now_s = time.monotonic()
            if line == "data: [DONE]":
                whole = True
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(str(event["error"]))
            request_id = event["id"]
            if event["choices"]:
                outcome.text += event["choices"][0]["text"]
                outcome.first_s = outcome.first_s if outcome.first_s == outcome.first_s else now_s
                outcome.last_s = now_s
            if event.get("usage"):
                outcome.num_tokens = event["usage"]["completion_tokens"]
    if not whole:
        raise ValueError("the stream broke off")
    return request_id


async def _trace(client: httpx.AsyncClient, request_id: str) -> Mapping[str, Any]:
    """The router notes it just after the client has the answer.

    Raises:
        LookupError: it did not.
    """
    deadline_s = time.monotonic() + _TRACE_WITHIN_S
    while time.monotonic() < deadline_s:
        response = await client.get(f"/baton/requests/{request_id}")
        if response.status_code == httpx.codes.OK:
            return dict(response.json())
        await asyncio.sleep(0.1)
    raise LookupError(f"the router has no trace of {request_id}")


async def _watch(client: httpx.AsyncClient, splits: list[SplitSample]) -> None:
    while True:
        workers = (await client.get("/baton/status")).json()["workers"]
        roles = [worker["role"] for worker in workers]
        splits.append(
            SplitSample(
                at_s=time.monotonic(),
                num_prefill=roles.count("prefill"),
                num_decode=roles.count("decode"),
            )
        )
        await asyncio.sleep(_STATUS_EVERY_S)
