"""A worker that cannot keep its requests hands them back: they go on elsewhere, whole."""

from __future__ import annotations

import asyncio

import pytest

from core.errors import NoWorkerAvailable, WorkerLost
from core.request import Path
from core.types import Role
from tests.integration.mock_workers import MockCluster, MockWorker

PROMPT = list(range(1000, 1100))
NUM_TOKENS = 60


async def begin(cluster: MockCluster) -> tuple[asyncio.Task, MockWorker]:
    """A request in the middle of its answer, and who gives it."""
    begun = asyncio.Event()
    task = asyncio.create_task(cluster.ask(PROMPT, NUM_TOKENS, Path.LOCAL, emit=lambda _: begun.set()))
    await begun.wait()
    return task, next(worker for worker in cluster.of(Role.DECODE) if worker.gate.num_inside)


async def test_what_is_handed_back_goes_on_elsewhere_with_no_token_lost_or_repeated() -> None:
    async with MockCluster(0, 2) as cluster:
        expected = (await cluster.ask(PROMPT, NUM_TOKENS, Path.LOCAL)).token_ids
        task, worker = await begin(cluster)
        worker.gate.draining, worker.decode_leg.keeps_promises = True, False
        assert worker.decode_leg.hand_back("it has drained for as long as it may") == 1
        assert await worker.gate.drain(1.0), "it is empty"
        assert (await task).token_ids == expected
        await cluster.wait_empty()


async def test_what_is_handed_back_with_nobody_else_there_ends_with_a_clear_error() -> None:
    async with MockCluster(0, 1) as cluster:
        task, worker = await begin(cluster)
        worker.gate.draining = True
        worker.decode_leg.hand_back("its engine does not answer")
        with pytest.raises((NoWorkerAvailable, WorkerLost)):
            await task
        assert worker.decode_leg.hand_back("again") == 0


async def test_a_promise_of_room_ends_with_the_trust_in_the_worker() -> None:
    async with MockCluster(1, 2) as cluster:
        expected = (await cluster.ask(PROMPT, 8, Path.REMOTE_EARLY)).token_ids
        for worker in cluster.of(Role.DECODE)[:1]:
            worker.gate.draining, worker.decode_leg.keeps_promises = True, False
        for _ in range(4):
            assert (await cluster.ask(PROMPT, 8, Path.REMOTE_EARLY)).token_ids == expected
        await cluster.wait_empty()


async def test_prefills_that_are_handed_back_are_done_elsewhere() -> None:
    async with MockCluster(2, 1) as cluster:
        expected = (await cluster.ask(PROMPT, 8)).token_ids
        for worker in cluster.of(Role.PREFILL):
            worker.engine.hang(1.0)
        asking = asyncio.create_task(cluster.ask(PROMPT, 8))
        async with asyncio.timeout(5):
            while not (held := [w for w in cluster.of(Role.PREFILL) if w.gate.num_inside]):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        held[0].gate.draining = True
        assert held[0].prefill_leg.hand_back() == 1
        answer = await asking
        assert answer.token_ids == expected
        assert answer.trace.fallbacks == ("prefill_retry",)
        await cluster.wait_empty()
