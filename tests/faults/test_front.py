"""What clients see when nobody can decode, when a router dies, and when HAProxy does."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.faults import injections as inject
from tests.faults.cluster import FaultCluster, in_thread
from tests.faults.injections import STREAM_PIECES, Scene
from tests.faults.load import Fate, Load, Outcome
from tests.faults.record import FaultReport
from tests.faults.references import LONG_ANSWER, MIXED, References
from tests.faults.row import IDLE_WITHIN_S, silences, wait_out

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
BACK_WITHIN_S = 10.0
REFUSED_WITHIN_S = 3.0
NUM_STREAMS = 8


async def ask_until_right(
    load: Load, references: References, within_s: float, every_s: float = 0.25
) -> list[Outcome]:
    """Asks short questions, one every so often, until one is answered; all of them in order."""
    asked: list[Outcome] = []
    cases = references.endless((MIXED,), "probes")
    until_s = time.monotonic() + within_s
    while True:
        asked.append(await load.ask(next(cases)))
        if asked[-1].fate is Fate.RIGHT:
            return asked
        assert time.monotonic() < until_s, f"no answer within {within_s:g} s: {asked[-1]}"
        await asyncio.sleep(every_s)


@pytest.mark.slow
@pytest.mark.fault_row(6)
async def test_without_decode_workers_requests_are_refused_at_once_until_one_is_back(
    broken_cluster: FaultCluster, references: References, fault_report: FaultReport
) -> None:
    async with Load(broken_cluster.url, references, clients=0) as load:
        await ask_until_right(load, references, 10)
        async with inject.kill_all_decode_workers(Scene(broken_cluster, load)) as hit:
            await in_thread(wait_out, broken_cluster, hit)  # what loses its worker may wait for another
            asked = await ask_until_right(load, references, 180, every_s=0.5)
        back_s = time.monotonic() - hit.at_s
        await in_thread(broken_cluster.wait_whole)
        whole_s = time.monotonic() - hit.at_s
    leaked = await in_thread(broken_cluster.leaked_blocks, IDLE_WITHIN_S)
    refused = asked[:-1]
    took_s = sorted((each.ended_s or 0) - each.began_s for each in refused)
    print(f"{len(refused)} refused within {took_s} s; back after {back_s:.1f} s")
    fault_report.record(
        row=6,
        what="all decode workers die",
        served=1,
        refused=len(refused),
        failed=load.count(Fate.FAILED),
        wrong=load.count(Fate.WRONG),
        silence_max_s=round(back_s, 1),
        whole_s=round(whole_s, 1),
        leaked=len(leaked),
    )
    assert refused, "nobody was refused"
    assert [str(each) for each in refused if each.fate is not Fate.REFUSED] == []
    assert [each for each in refused if each.status != 503 or not each.retry_after] == []
    # One may meet a machine that stands still for a moment.
    assert all(each < REFUSED_WITHIN_S for each in took_s[:-1])
    assert leaked == {}
    assert await in_thread(broken_cluster.orphans) == []


@pytest.mark.fault_row(15)
async def test_a_router_that_dies_breaks_its_own_streams_only(
    broken_cluster: FaultCluster, references: References, fault_report: FaultReport
) -> None:
    async with Load(broken_cluster.url, references, clients=0) as load:
        cases = references.endless((LONG_ANSWER,), "streams")
        streams = [asyncio.create_task(load.ask(next(cases))) for _ in range(NUM_STREAMS)]
        await load.wait_until("streams", lambda: len(load.streaming(STREAM_PIECES)) == NUM_STREAMS)
        async with inject.kill_router(Scene(broken_cluster, load)) as hit:
            asked = await ask_until_right(load, references, 60)
        back_s = time.monotonic() - hit.at_s
        await asyncio.gather(*streams)
    lived = [each for each in load.outcomes if each.case.kind == LONG_ANSWER and each.fate is Fate.RIGHT]
    cut = [each for each in load.outcomes if each.case.kind == LONG_ANSWER and each.fate is Fate.FAILED]
    leaked = await in_thread(broken_cluster.leaked_blocks, IDLE_WITHIN_S)
    await in_thread(broken_cluster.wait_whole)
    print(f"{len(lived)} streams lived, {len(cut)} were cut; served after {back_s:.2f} s, try {len(asked)}")
    fault_report.record(
        row=15,
        what="a router dies",
        served=len(lived) + 1,
        failed=len(cut) + len(asked) - 1,
        wrong=load.count(Fate.WRONG),
        **silences(load.outcomes, hit.at_s),
        whole_s=round(time.monotonic() - hit.at_s, 1),
        leaked=len(leaked),
    )
    assert load.count(Fate.WRONG) == 0
    assert lived, "every stream died with one router"
    assert len(lived) + len(cut) == NUM_STREAMS
    assert back_s < BACK_WITHIN_S
    assert leaked == {}
    assert await in_thread(broken_cluster.orphans) == []


@pytest.mark.fault_row(23)
async def test_haproxy_is_back_within_seconds_and_nothing_is_orphaned(
    broken_cluster: FaultCluster, references: References, fault_report: FaultReport
) -> None:
    async with Load(broken_cluster.url, references, clients=0) as load:
        cases = references.endless((LONG_ANSWER,), "streams")
        streams = [asyncio.create_task(load.ask(next(cases))) for _ in range(NUM_STREAMS)]
        await load.wait_until("streams", lambda: len(load.streaming(STREAM_PIECES)) == NUM_STREAMS)
        async with inject.kill_haproxy(Scene(broken_cluster, load)) as hit:
            await asyncio.gather(*streams)
            asked = await ask_until_right(load, references, 60)
        back_s = time.monotonic() - hit.at_s
    leaked = await in_thread(broken_cluster.leaked_blocks, IDLE_WITHIN_S)
    left = await in_thread(broken_cluster.orphans)
    print(f"HAProxy back after {back_s:.2f} s, try {len(asked)}")
    fault_report.record(
        row=23,
        what="HAProxy dies",
        served=1,
        failed=load.count(Fate.FAILED),
        wrong=load.count(Fate.WRONG),
        silence_max_s=round(back_s, 2),
        leaked=len(leaked),
        orphans=len(left),
    )
    assert load.count(Fate.WRONG) == 0
    assert back_s < BACK_WITHIN_S
    assert leaked == {}
    assert left == []
