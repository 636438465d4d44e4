"""The demo's second half: more long prompts than two prefill workers can take, until the planner acts."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from core.errors import BatonError

RATE_RPS = 7.0
LIMIT_S = 40.0
"""A machine too busy to keep the engines' pace is not waited for any longer."""
_PROMPT_TOKENS = 800
_ANSWER_TOKENS = 6
_VOCABULARY = range(10, 2000)
_REQUEST_TIMEOUT_S = 120.0
_TRACE_WITHIN_S = 5.0

Move = Mapping[str, Any]
"""A decision, as a router's /baton/planner gives it."""
Trace = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What came of it."""

    traces: tuple[Trace, ...]
    """Of all requests; every one was answered."""
    seconds: float
    """For which requests came."""
    move: Move | None
    """The planner's decision; None if it made none in time."""
    reason: str
    """The planner's, of that decision or else of its last."""
    num_ongoing: int = 0
    """Requests that were on their way when the decision was seen."""

    @property
    def switched(self) -> set[str]:
        """Workers that began to prefill."""
        return set() if self.move is None else _to_prefill(self.move)

    @property
    def num_served(self) -> int:
        """Requests that those workers prefilled."""
        return sum(trace["prefill_worker"] in self.switched for trace in self.traces)


async def send_burst(url: str, model: str) -> Burst:
    """Sends long prompts with short answers until a worker has begun to prefill and done so, or the limit.

    Raises:
        BatonError: a request failed.
    """
    began_s, wall_s = time.monotonic(), time.time()
    move, num_ongoing, asked = None, 0, list[asyncio.Task[Trace]]()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_REQUEST_TIMEOUT_S, limits=limits) as client:
        try:
            while time.monotonic() - began_s < LIMIT_S:
                asked.append(asyncio.create_task(_ask(client, model, len(asked))))
                await asyncio.sleep(max(0.0, began_s + len(asked) / RATE_RPS - time.monotonic()))
                if move is None and (move := await _move_since(client, wall_s)) is not None:
                    num_ongoing = sum(not task.done() for task in asked)
                traces = [task.result() for task in asked if task.done()]
                if move and any(trace["prefill_worker"] in _to_prefill(move) for trace in traces):
                    break
            seconds = time.monotonic() - began_s
            reason = await _last_reason(client) if move is None else str(move["reason"])
            all_traces = await asyncio.gather(*asked)
        finally:
            for task in asked:
                task.cancel()
    return Burst(traces=tuple(all_traces), seconds=seconds, move=move, reason=reason, num_ongoing=num_ongoing)


def _to_prefill(move: Move) -> set[str]:
    return {change["worker_id"] for change in move["role_changes"] if change["role"] == "prefill"}


async def _move_since(client: httpx.AsyncClient, wall_s: float) -> Move | None:
    """The first decision since then that made a worker prefill."""
    try:
        answer = (await client.get("/baton/planner?moves=true&last=20")).raise_for_status().json()
    except httpx.HTTPError:
        return None  # it is asked again
    found = (move for move in answer["decisions"] if move["at_s"] >= wall_s and move["carried_out"])
    return next((move for move in found if _to_prefill(move)), None)


async def _last_reason(client: httpx.AsyncClient) -> str:
    try:
        decisions = (await client.get("/baton/planner?last=1")).raise_for_status().json()["decisions"]
    except httpx.HTTPError:
        return "does not answer"
    return str(decisions[-1]["reason"]) if decisions else "has not looked yet"


async def _ask(client: httpx.AsyncClient, model: str, number: int) -> Trace:
    prompt = random.Random(number).choices(_VOCABULARY, k=_PROMPT_TOKENS)
    body = {"model": model, "prompt": prompt, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
    try:
        response = await client.post("/v1/completions", json=body)
        if response.status_code != httpx.codes.OK:
            raise BatonError(f"request {number} of the burst failed: {response.status_code} {response.text}")
        return await _trace(client, response.json()["id"])
    except httpx.HTTPError as error:
        raise BatonError(f"request {number} of the burst failed: {error!r}") from error


async def _trace(client: httpx.AsyncClient, request_id: str) -> Trace:
    """The router notes it just after the client has the answer."""
    deadline_s = time.monotonic() + _TRACE_WITHIN_S
    while True:
        response = await client.get(f"/baton/requests/{request_id}")
        if response.status_code == httpx.codes.OK:
            return dict(response.json())
        if time.monotonic() > deadline_s:
            raise BatonError(f"the router has no trace of {request_id}")
        await asyncio.sleep(0.05)
