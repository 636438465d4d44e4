"""Clients that hang up, and for how long workers go on holding KV blocks for them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.fault_client import Ask, Fate, FaultClient
from benchmarks.fault_injections import STREAM_PIECES
from benchmarks.fault_requests import LONG_ANSWER, LONG_PROMPT, MIDDLE, Requests
from benchmarks.fault_systems import DECODE, System, stopped_engines

CHECKS_S = (2.0, 10.0)
_POLL_S = 0.25
_FREE_FOR_SURE_AFTER_S = 4.0
_STREAM_FOR_S = 1.0
_STREAM_WITHIN_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveRow:
    """A phase in which clients hang up.

    Args:
        after_s: seconds after the requests were sent; None: when all of them stream.
        decode_stopped: decode engines do nothing meanwhile, so nobody pulls what is prefilled.
    """

    what: str
    kind: str
    clients: int
    after_s: float | None
    decode_stopped: bool = False


LEAVE_ROWS = (
    LeaveRow(what="while queued", kind=LONG_PROMPT, clients=24, after_s=1.0),
    LeaveRow(what="in prefill", kind=LONG_PROMPT, clients=6, after_s=1.6),
    LeaveRow(what="between the legs", kind=MIDDLE, clients=4, after_s=2.5, decode_stopped=True),
    LeaveRow(what="in decode", kind=LONG_ANSWER, clients=6, after_s=None),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveResult:
    """KV blocks are summed over all workers; seconds count from the moment the clients hung up."""

    row: LeaveRow
    left: int
    """Clients whose request was running when they were to leave."""
    held_most: int
    """At any time from just before they hung up: metrics lag by up to a second."""
    held_after: Sequence[int]
    """At each of ``CHECKS_S``."""
    free_s: float | None
    """When nothing was held any more, requests included; None if something still was in the end."""

    def __str__(self) -> str:
        return f"blocks held {self.held_most}, then {self.held_after}; free after {self.free_s} s"


async def run_leave_row(system: System, row: LeaveRow, requests: Requests) -> LeaveResult:
    asks = requests.leavers[row.kind][: row.clients]
    with contextlib.ExitStack() as stack:
        if row.decode_stopped:
            decoding = [worker for worker in system.workers() if worker.role == DECODE]
            stack.enter_context(stopped_engines(decoding))
        left, held_most, left_s = await _ask_and_leave(system, row, asks)
    held_after: list[int] = []
    free_s: float | None = None
    since_s = 0.0
    while since_s < CHECKS_S[-1] and not (free_s is not None and since_s > _FREE_FOR_SURE_AFTER_S):
        await asyncio.sleep(_POLL_S)
        blocks, requests_held = await asyncio.to_thread(_held, system)
        since_s = time.monotonic() - left_s
        held_most = max(held_most, blocks)
        free_s = None if blocks or requests_held else free_s or since_s
        if since_s >= CHECKS_S[len(held_after)]:
            held_after.append(blocks)
    held_after += [0] * (len(CHECKS_S) - len(held_after))
    return LeaveResult(row=row, left=left, held_most=held_most, held_after=held_after, free_s=free_s)


async def _ask_and_leave(system: System, row: LeaveRow, asks: Sequence[Ask]) -> tuple[int, int, float]:
    leave = asyncio.Event()
    async with FaultClient(system.url) as client:
        asking = [asyncio.create_task(client.ask(ask, leave=leave.wait)) for ask in asks]
        if row.after_s is None:
            await _until(lambda: client.num_streaming(STREAM_PIECES) == len(asks), _STREAM_WITHIN_S)
            await asyncio.sleep(_STREAM_FOR_S)
        else:
            await asyncio.sleep(row.after_s)
        held_before, _ = await asyncio.to_thread(_held, system)
        leave.set()
        left_s = time.monotonic()
        outcomes = await asyncio.gather(*asking)
    if row.decode_stopped:
        await asyncio.sleep(0.1)  # everybody has heard of it before anybody goes on
    return sum(outcome.fate is Fate.LEFT for outcome in outcomes), held_before, left_s


def _held(system: System) -> tuple[int, int]:
    held = system.held().values()
    return sum(each.kv_blocks for each in held), sum(each.requests for each in held)


async def _until(holds: Callable[[], bool], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline_s:  # noqa: ASYNC110  a condition over many tasks
        await asyncio.sleep(0.02)
