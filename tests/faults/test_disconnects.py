"""Clients that hang up, at each stage of a request: every worker is free within two seconds, and says so."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tests.faults.cluster import FaultCluster, in_thread
from tests.faults.injections import STREAM_PIECES
from tests.faults.load import Fate, Load, Outcome
from tests.faults.processes import send
from tests.faults.record import FaultReport
from tests.faults.references import LONG_ANSWER, LONG_PROMPT, References

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(400),
    pytest.mark.fault_row(9),
    # A connection that is cancelled while it opens is left to the garbage collector by the client.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
FREE_WITHIN_S = 2.0
NUM_QUEUED = 24
NUM_LESSONS = 4


class Leavers:
    """Clients that hang up together, and how long the workers then take to be free."""

    def __init__(self, cluster: FaultCluster, load: Load, report: FaultReport) -> None:
        self.cluster = cluster
        self.load = load
        self.report = report
        self.leave = asyncio.Event()
        self._asking: list[asyncio.Task[Outcome]] = []

    def ask(self, references: References, kind: str, number: int) -> None:
        async def until_told(_: Outcome) -> None:
            await self.leave.wait()

        cases = references.endless((kind,), f"leavers {kind}")
        self._asking = [asyncio.create_task(self.load.ask(next(cases), until_told)) for _ in range(number)]

    async def until(self, role: str, what: str, within_s: float = 10.0) -> None:
        """A router says that a worker of the role has some of this."""
        deadline_s = time.monotonic() + within_s
        while not any(each[what] for each in await in_thread(self.cluster.workers) if each["role"] == role):
            assert time.monotonic() < deadline_s, f"no {role} worker has {what}"
            await asyncio.sleep(0.01)

    async def are_queued(self, number: int, within_s: float) -> bool:
        deadline_s = time.monotonic() + within_s
        while await in_thread(self.cluster.num_queued) < number:
            if time.monotonic() > deadline_s:
                return False
        return True

    async def go(self) -> None:
        """Without a look at what they leave behind."""
        self.leave.set()
        await asyncio.gather(*self._asking)

    async def hang_up(self, what: str) -> None:
        """All at once; then checks that the workers hold nothing soon after."""
        self.leave.set()
        left_s = time.monotonic()
        outcomes = await asyncio.gather(*self._asking)
        leaked = await in_thread(self.cluster.leaked_blocks, FREE_WITHIN_S + 3)
        free_s = time.monotonic() - left_s
        num_left = sum(each.fate is Fate.LEFT for each in outcomes)
        print(f"{what}: {num_left} of {len(outcomes)} left; free after {free_s:.2f} s")
        self.report.record(
            row=9,
            what=f"clients hang up {what}",
            silence_max_s=round(free_s, 2),
            wrong=0,
            failed=0,
            leaked=len(leaked),
        )
        assert num_left > len(outcomes) / 2, "too few were still running when they were to leave"
        assert leaked == {}
        assert free_s < FREE_WITHIN_S


async def test_clients_that_hang_up_while_queued(
    broken_cluster: FaultCluster, references: References, fault_report: FaultReport
) -> None:
    async with Load(broken_cluster.url, references, clients=0, fresh=1.0) as load:
        for _ in range(NUM_LESSONS):
            leavers = Leavers(broken_cluster, load, fault_report)
            leavers.ask(references, LONG_PROMPT, NUM_QUEUED)
            if await leavers.are_queued(NUM_QUEUED // 4, within_s=8.0):
                break
            await leavers.go()  # routers that are new send all at once until they know how long prompts take
        else:
            pytest.fail("nothing is queued")
        await leavers.hang_up("while they wait in the router")
        assert await in_thread(broken_cluster.num_queued) == 0


async def test_clients_that_hang_up_during_prefill(
    broken_cluster: FaultCluster, references: References, fault_report: FaultReport
) -> None:
    async with Load(broken_cluster.url, references, clients=0, fresh=1.0) as load:
        leavers = Leavers(broken_cluster, load, fault_report)
        leavers.ask(references, LONG_PROMPT, 2)
        await leavers.until("prefill", "waiting_prefill_tokens")
        await leavers.hang_up("during prefill")


async def test_clients_that_hang_up_between_prefill_and_decode(
    broken_cluster: FaultCluster, references: References, fault_report: FaultReport
) -> None:
    engines = [each.engine for each in await in_thread(broken_cluster.of, "decode") if each.engine]
    async with Load(broken_cluster.url, references, clients=0, fresh=1.0) as load:
        leavers = Leavers(broken_cluster, load, fault_report)
        leavers.ask(references, LONG_PROMPT, 2)
        send(signal.SIGSTOP, *engines)  # nobody pulls what is handed over
        try:
            await leavers.until("prefill", "num_pinned")
            leavers.leave.set()
            await asyncio.sleep(0.1)
        finally:
            send(signal.SIGCONT, *engines)
        await leavers.hang_up("between prefill and decode")


async def test_clients_that_hang_up_while_tokens_stream(
    broken_cluster: FaultCluster, references: References, fault_report: FaultReport
) -> None:
    async with Load(broken_cluster.url, references, clients=0, fresh=1.0) as load:
        leavers = Leavers(broken_cluster, load, fault_report)
        leavers.ask(references, LONG_ANSWER, 6)
        await load.wait_until("streams", lambda: len(load.streaming(STREAM_PIECES)) == 6)
        await leavers.hang_up("while tokens stream")
