"""One row of the fault matrix: a fault, the load it hits, and what is expected of the cluster."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.cluster import FaultCluster, in_thread
from tests.faults.injections import Fault, Hit, Scene
from tests.faults.load import Fate, Load, Outcome
from tests.faults.references import ANY, References

IDLE_WITHIN_S = 10.0
"""Leases of a worker that died, and the last heartbeats, are over by then."""


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """Who asks while it happens."""

    clients: int = 6
    kinds: Sequence[str] = ANY
    fresh: float = 0.8


@dataclass(frozen=True, kw_only=True)
class Expect:
    """What must hold. No wrong token, no leaked KV block and no orphan process are expected of every row."""

    max_errors: int = 0
    """Requests that may fail or be cut."""
    max_refused: int = 0
    """Requests that may be refused with 503 before any work."""
    min_served: int = 1
    """Requests that must be answered rightly between the fault and the end of the recovery."""
    max_silence_s: float | None = None
    """No answer may pause for longer because of the fault, its first token included."""
    out_within_s: float | None = None
    """The workers that were hit leave the pool within this time."""
    whole_within_s: float = 120.0
    """The pool is complete again, with a worker in place of every one that died."""
    counts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Counters (name to labels) that must have grown..."""
    still: dict[str, dict[str, str]] = field(default_factory=dict)
    """...and that must not."""


@dataclass(frozen=True)
class Row:
    """A fault, a load, an expectation.

    Args:
        number: in the fault matrix.
        hold_s: how long a fault that lasts does so.
    """

    number: int
    what: str
    fault: Fault
    expect: Expect
    load: LoadSpec = LoadSpec()
    hold_s: float = 0.0
    slow: bool = True


@dataclass
class Result:
    """What was measured of one row."""

    served: int
    """Requests answered rightly between the fault and the end of the recovery."""
    failed: int
    refused: int
    wrong: int
    silence_p50_s: float
    """Longest pause of an answer, of the requests that were running when it happened or asked until then."""
    silence_max_s: float
    whole_s: float
    """From the fault until the pool was complete."""
    leaked: int
    """Workers that still held KV blocks or requests when everybody had their answer."""
    orphans: int
    out_s: float | None = None


async def run_row(row: Row, cluster: FaultCluster, references: References) -> tuple[Result, list[str]]:
    """Breaks the cluster as the row says, under its load.

    Returns:
        What was measured, and what was not as expected.
    """
    before = await in_thread(_counters, cluster, row.expect.counts)
    still_before = await in_thread(_counters, cluster, row.expect.still)
    spec = row.load
    load = Load(
        cluster.url, references, clients=spec.clients, kinds=spec.kinds, fresh=spec.fresh, seed=row.what
    )
    out_s: float | None = None
    async with load:
        await load.wait_until("the load runs", lambda: len(load.streaming()) >= min(2, spec.clients))
        async with row.fault(Scene(cluster, load)) as hit:
            if row.expect.out_within_s is not None:
                out_s = await in_thread(wait_out, cluster, hit)
            await asyncio.sleep(row.hold_s)
        await in_thread(_wait_whole_without, cluster, hit, row)
        whole_s = time.monotonic() - hit.at_s
        await asyncio.sleep(0.5)
    leaked = await in_thread(cluster.leaked_blocks, IDLE_WITHIN_S)
    orphans = await in_thread(cluster.orphans)
    after = await in_thread(_counters, cluster, row.expect.counts)
    still_after = await in_thread(_counters, cluster, row.expect.still)

    touched = [outcome for outcome in load.since(hit.at_s) if outcome.began_s < hit.at_s + whole_s]
    result = Result(
        served=sum(outcome.fate is Fate.RIGHT for outcome in touched),
        failed=load.count(Fate.FAILED),
        refused=load.count(Fate.REFUSED),
        wrong=load.count(Fate.WRONG),
        **silences(touched, hit.at_s),
        whole_s=round(whole_s, 1),
        leaked=len(leaked),
        orphans=len(orphans),
        out_s=out_s,
    )
    troubles = list(check(row.expect, result))
    troubles += [f"{name} has not grown" for name in before if not after[name] > before[name]]
    troubles += [f"{name} has grown" for name in still_before if still_after[name] > still_before[name]]
    troubles += [f"leaked: {line}" for line in leaked.values()] + [f"orphan: {line}" for line in orphans]
    if troubles:
        bad = (Fate.WRONG, Fate.FAILED, Fate.REFUSED)
        troubles += [str(outcome) for outcome in load.outcomes if outcome.fate in bad][:10]
    return result, troubles


def silences(outcomes: Sequence[Outcome], since_s: float) -> dict[str, float]:
    """Median and maximum of the longest pause of each request that was answered."""
    pauses = [each.longest_silence_s(since_s) for each in outcomes if each.fate is Fate.RIGHT]
    return {
        "silence_p50_s": round(statistics.median(pauses), 2) if pauses else 0.0,
        "silence_max_s": round(max(pauses, default=0.0), 2),
    }


def check(expect: Expect, result: Result) -> list[str]:
    """What is not as expected, in a sentence each."""
    limits: list[tuple[str, float, float | None]] = [
        ("wrong answers", result.wrong, 0),
        ("workers that still hold something", result.leaked, 0),
        ("orphan processes", result.orphans, 0),
        ("failed requests", result.failed, expect.max_errors),
        ("refused requests", result.refused, expect.max_refused),
        ("seconds of silence", result.silence_max_s, expect.max_silence_s),
        ("seconds until the pool was whole", result.whole_s, expect.whole_within_s),
        ("seconds until the victim was out", result.out_s or 0, expect.out_within_s),
    ]
    found = [
        f"{got} {what}, not {most} at most" for what, got, most in limits if most is not None and got > most
    ]
    if result.served < expect.min_served:
        found.append(f"{result.served} requests served during the fault, not {expect.min_served} or more")
    return found


def _counters(cluster: FaultCluster, wanted: dict[str, dict[str, str]]) -> dict[str, float]:
    return {name: cluster.counter(name, **labels) for name, labels in wanted.items()}


def wait_out(cluster: FaultCluster, hit: Hit) -> float:
    """Until no router counts on a victim; returns the seconds since the fault."""
    _until("the victims are out", 30, lambda: not _still_ready(cluster, hit))
    return round(time.monotonic() - hit.at_s, 2)


def _still_ready(cluster: FaultCluster, hit: Hit) -> list[str]:
    ready = [each for _ in range(2) for each in cluster.workers() if each["state"] == "ready"]
    return [each["worker_id"] for each in ready if each["worker_id"] in hit.victims]


def _wait_whole_without(cluster: FaultCluster, hit: Hit, row: Row) -> None:
    """Whole, with new workers where the fault has killed some."""
    if row.fault.__name__.startswith("kill_"):
        _until("the victims are gone", 60, lambda: not _still_ready(cluster, hit))
    cluster.wait_whole(row.expect.whole_within_s + 60)


def _until(what: str, within_s: float, holds: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.05)
