"""Workers killed at the moment a row is about; every worker dies by SIGKILL, its engine with it.

Moments are found alike in every system: by what clients have heard, by the set pace of the engines, and by
engines that are stopped for a moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks.fault_client import FaultClient
from benchmarks.fault_requests import NUM_REQUESTS
from benchmarks.fault_systems import DECODE, PREFILL, System, Worker, busiest, kill, stopped_engines

STREAM_PIECES = 8
"""Pieces of an answer after which a stream is well under way."""
PREFILL_FOR_S = 1.5
"""Two prefill workers have 20 prompts of 0.75 s each: by then, each is at its second or third."""
HANDED_OVER_AFTER_S = 4.0
"""Two prefill workers have 20 prompts of 0.2 s each: by then, every decode worker was sent some."""
_STREAM_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class Hit:
    """Who was killed, and when, in seconds of the monotonic clock."""

    at_s: float
    victims: Sequence[Worker]


Injection = Callable[[System, FaultClient], Awaitable[Hit]]


async def kill_prefill_worker_while_prefilling(system: System, _: FaultClient) -> Hit:
    await asyncio.sleep(PREFILL_FOR_S)
    return _hit([busiest(system, PREFILL)])


async def kill_decode_worker_before_its_first_token(system: System, _: FaultClient) -> Hit:
    """Decode engines are stopped from the start, so that none of them can have answered."""
    with stopped_engines(_all(system, DECODE)):
        await asyncio.sleep(HANDED_OVER_AFTER_S)
        return _hit([busiest(system, DECODE)])


async def kill_decode_worker_mid_stream(system: System, client: FaultClient) -> Hit:
    await _until_streaming(client, NUM_REQUESTS // 2)
    return _hit([busiest(system, DECODE)])


async def kill_all_prefill_workers(system: System, _: FaultClient) -> Hit:
    await asyncio.sleep(PREFILL_FOR_S)
    return _hit(_all(system, PREFILL))


async def _until_streaming(client: FaultClient, number: int) -> None:
    """Goes on after a while in any case: a system may be too slow to have so many at once."""
    deadline_s = time.monotonic() + _STREAM_WITHIN_S
    while client.num_streaming(STREAM_PIECES) < number and time.monotonic() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def _hit(victims: Sequence[Worker]) -> Hit:
    return Hit(kill(victims), victims)


def _all(system: System, role: str) -> list[Worker]:
    return [worker for worker in system.workers() if worker.role == role]


@dataclass(frozen=True, slots=True)
class KillRow:
    """A row in which workers die."""

    number: int
    what: str
    requests: str
    """Key of the row's requests."""
    inject: Injection


KILL_ROWS = (
    KillRow(1, "a prefill worker, while it prefills", "prefill", kill_prefill_worker_while_prefilling),
    KillRow(
        3, "a decode worker, before its first token", "first token", kill_decode_worker_before_its_first_token
    ),
    KillRow(4, "a decode worker, in mid-stream", "stream", kill_decode_worker_mid_stream),
    KillRow(5, "all prefill workers", "all prefill", kill_all_prefill_workers),
)
