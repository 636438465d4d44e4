"""One killing row on one system: what became of its requests, and of the ones that came after."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.fault_client import Ask, Fate, FaultClient, Outcome
from benchmarks.fault_injections import Hit, KillRow
from benchmarks.fault_requests import Requests
from benchmarks.fault_systems import System, is_whole, wait_whole

PROBE_EVERY_S = 0.5
PROBE_TIMEOUT_S = 15.0
_PROBE_AFTER_WHOLE_S = 3.0
_PROBE_AT_MOST_S = 75.0
_WHOLE_AT_MOST_S = 180.0
_HELD_CHECKS_S = (2.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class KillResult:
    """Of one row; seconds count from the kill."""

    row: KillRow
    fates: Mapping[Fate, int]
    errors: Mapping[str, int]
    """What failed and wrong requests ended with."""
    probes: int
    """New requests, one every ``PROBE_EVERY_S`` from the kill until the workers are back."""
    probes_failed: int
    probe_errors: Mapping[str, int]
    first_right_s: float | None
    """When the first new request was answered rightly."""
    last_failed_s: float
    """When the last new request was sent that failed; 0 if none did."""
    whole_s: float | None
    """When the system had all its workers again."""
    held_after: Sequence[int]
    """KV blocks in use 2 s and 10 s after the last answer."""

    def __str__(self) -> str:
        fates = ", ".join(f"{count} {fate}" for fate, count in self.fates.items())
        return (
            f"{fates}; {dict(self.errors)}; {self.probes_failed} of {self.probes} new ones failed, "
            f"first right one after {self.first_right_s} s; whole after {self.whole_s} s; "
            f"blocks held {self.held_after}"
        )

    def count(self, fate: Fate) -> int:
        return self.fates.get(fate, 0)


async def run_kill_row(system: System, row: KillRow, requests: Requests) -> KillResult:
    asks = requests.by_row[row.requests]
    async with FaultClient(system.url) as client, FaultClient(system.url) as probing:
        asking = [asyncio.create_task(client.ask(ask)) for ask in asks]
        hit = await row.inject(system, client)
        system.restart(hit.victims)
        prober = asyncio.create_task(_probe(system, probing, hit, requests.probes))
        outcomes = await asyncio.gather(*asking)
        probes, whole_s = await prober
    if whole_s is None and await asyncio.to_thread(wait_whole, system, _WHOLE_AT_MOST_S - _PROBE_AT_MOST_S):
        whole_s = time.monotonic() - hit.at_s
    right_s = [probe.ended_s - hit.at_s for probe in probes if probe.fate is Fate.RIGHT]
    failed = [probe for probe in probes if probe.fate is not Fate.RIGHT]
    return KillResult(
        row=row,
        fates=_counts(outcomes),
        errors=_errors(outcomes),
        probes=len(probes),
        probes_failed=len(failed),
        probe_errors=_errors(failed),
        first_right_s=min(right_s, default=None),
        last_failed_s=max((probe.began_s - hit.at_s for probe in failed), default=0.0),
        whole_s=whole_s,
        held_after=await _held_after(system),
    )


async def _probe(
    system: System, client: FaultClient, hit: Hit, probes: Sequence[Ask]
) -> tuple[list[Outcome], float | None]:
    """New requests at a steady pace, and when the system was whole."""
    endless = itertools.cycle(probes)
    asking: list[asyncio.Task[Outcome]] = []
    whole_s: float | None = None
    looking: asyncio.Task[bool] | None = None
    while (since_s := time.monotonic() - hit.at_s) < _PROBE_AT_MOST_S:
        if whole_s is not None and since_s > whole_s + _PROBE_AFTER_WHOLE_S:
            break
        asking.append(asyncio.create_task(client.ask(next(endless), timeout_s=PROBE_TIMEOUT_S)))
        if looking is None:
            looking = asyncio.create_task(asyncio.to_thread(is_whole, system))
        elif looking.done():
            if whole_s is None and looking.result():
                whole_s = since_s
            looking = None
        await asyncio.sleep(PROBE_EVERY_S)
    with contextlib.suppress(asyncio.CancelledError):
        if looking is not None:
            await looking
    return list(await asyncio.gather(*asking)), whole_s


def _counts(outcomes: Sequence[Outcome]) -> dict[Fate, int]:
    return dict(Counter(outcome.fate for outcome in outcomes if outcome.fate is not None))


def _errors(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return dict(Counter(outcome.why for outcome in outcomes if outcome.why))


async def _held_after(system: System) -> list[int]:
    """Looks a second time only where something was held the first time."""
    found: list[int] = []
    began_s = time.monotonic()
    for check_s in _HELD_CHECKS_S:
        await asyncio.sleep(began_s + check_s - time.monotonic())
        held = await asyncio.to_thread(system.held)
        found.append(sum(each.kv_blocks for each in held.values()))
        if not found[-1]:
            break
    return found + [0] * (len(_HELD_CHECKS_S) - len(found))
