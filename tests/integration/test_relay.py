"""The relay over real gRPC and mock engines: paths, fallbacks, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from core.errors import NoWorkerAvailable
from core.request import Path
from core.types import Role
from tests.integration.mock_workers import MockCluster, MockWorker

PROMPT = list(range(1000, 1100))


async def answers_of_one_worker(prompt: list[int], max_tokens: int) -> list[int]:
    async with MockCluster(0, 1) as alone:
        return (await alone.ask(prompt, max_tokens, Path.LOCAL)).token_ids


async def first_of(workers: list[MockWorker], holds: Callable[[MockWorker], object]) -> MockWorker:
    """The first worker of which something holds, as soon as there is one."""
    async with asyncio.timeout(10):
        while True:
            for worker in workers:
                if holds(worker):
                    return worker
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("path", [Path.REMOTE_EARLY, Path.REMOTE, Path.LOCAL])
async def test_every_path_gives_the_answer_of_one_worker(path: Path) -> None:
    expected = await answers_of_one_worker(PROMPT, 8)
    async with MockCluster(1, 1) as cluster:
        answer = await cluster.ask(PROMPT, 8, path)
        await cluster.wait_empty()
    assert answer.token_ids == expected
    assert answer.finish_reason == "length"
    assert answer.trace.path is path
    assert (answer.trace.kv_outcome == "pulled") == (path is not Path.LOCAL)


async def test_the_first_token_is_out_before_the_decode_worker_has_done_anything() -> None:
    async with MockCluster(1, 1) as cluster:
        (decode,) = cluster.of(Role.DECODE)
        num_inside: list[int] = []
        await cluster.ask(PROMPT, 3, emit=lambda delta: num_inside.append(decode.gate.num_inside))
    assert len(num_inside) > 1
    assert num_inside[0] == 0


async def test_an_answer_of_one_token_never_touches_a_decode_worker() -> None:
    async with MockCluster(1, 1) as cluster:
        answer = await cluster.ask(PROMPT, 1, Path.PREFILL_ONLY)
        await cluster.wait_empty()
    assert len(answer.token_ids) == 1
    assert answer.trace.decode_worker == ""


async def test_a_dead_prefill_worker_is_passed_over() -> None:
    expected = await answers_of_one_worker(PROMPT, 8)
    async with MockCluster(2, 1) as cluster:
        await cluster.of(Role.PREFILL)[0].kill()
        for _ in range(4):
            answer = await cluster.ask(PROMPT, 8)
            assert answer.token_ids == expected
        await cluster.wait_empty()


async def test_a_prefill_worker_that_dies_while_it_prefills_is_replaced() -> None:
    expected = await answers_of_one_worker(PROMPT, 8)
    async with MockCluster(2, 1) as cluster:
        for worker in cluster.of(Role.PREFILL):
            worker.engine.hang(0.5)
        asking = asyncio.create_task(cluster.ask(PROMPT, 8))
        busy = await first_of(cluster.of(Role.PREFILL), lambda worker: worker.engine.load().num_waiting)
        await busy.kill()
        answer = await asking
        await cluster.wait_empty()
    assert answer.token_ids == expected
    assert "prefill_retry" in answer.trace.fallbacks


async def test_a_prefill_worker_that_leaves_the_cluster_is_not_waited_for() -> None:
    expected = await answers_of_one_worker(PROMPT, 8)
    async with MockCluster(2, 1) as cluster:
        for worker in cluster.of(Role.PREFILL):
            worker.engine.hang(1.0)
        asking = asyncio.create_task(cluster.ask(PROMPT, 8))
        busy = await first_of(cluster.of(Role.PREFILL), lambda worker: worker.engine.load().num_waiting)
        await cluster.publish(leave_out=(busy,))
        answer = await asking
        await cluster.wait_empty()
    assert answer.token_ids == expected
    assert "prefill_retry" in answer.trace.fallbacks


async def test_a_snapshot_without_a_worker_leaves_its_streams_alone() -> None:
    expected = await answers_of_one_worker(PROMPT, 60)
    async with MockCluster(1, 2) as cluster:
        asking = asyncio.create_task(cluster.ask(PROMPT, 60))
        busy = await first_of(cluster.of(Role.DECODE), lambda worker: worker.gate.num_inside)
        await cluster.publish(leave_out=(busy,))
        others = await asyncio.gather(*(cluster.ask(PROMPT, 4) for _ in range(4)))
        assert all(answer.trace.decode_worker != busy.worker_id for answer in others)
        answer = await asking
    assert answer.token_ids == expected
    assert answer.trace.fallbacks == ()


async def test_workers_with_unlike_weights_never_share_a_request() -> None:
    cluster = MockCluster(2, 2)
    for number, worker in enumerate(cluster.workers):
        worker.revision = "ab"[number % 2]
    revision_of = {worker.worker_id: worker.revision for worker in cluster.workers}
    async with cluster:
        answers = await asyncio.gather(*(cluster.ask(PROMPT, 4) for _ in range(20)))
    pairs = {(revision_of[a.trace.prefill_worker], revision_of[a.trace.decode_worker]) for a in answers}
    assert pairs == {("a", "a"), ("b", "b")}


async def test_without_prefill_workers_the_decode_worker_prefills() -> None:
    expected = await answers_of_one_worker(PROMPT, 8)
    async with MockCluster(1, 1) as cluster:
        await cluster.publish(leave_out=tuple(cluster.of(Role.PREFILL)))
        answer = await cluster.ask(PROMPT, 8)
    assert answer.token_ids == expected
    assert answer.trace.path is Path.LOCAL
    assert answer.trace.fallbacks == ("no_prefill_worker",)


async def test_a_failed_pull_is_recomputed() -> None:
    expected = await answers_of_one_worker(PROMPT, 8)
    async with MockCluster(1, 1) as cluster:
        cluster.of(Role.DECODE)[0].engine.fail_next_pull()
        answer = await cluster.ask(PROMPT, 8)
        await cluster.wait_empty()
    assert answer.token_ids == expected
    assert answer.trace.kv_outcome == "recomputed"


async def test_a_lease_is_renewed_while_the_decode_worker_is_busy() -> None:
    expected = await answers_of_one_worker(PROMPT, 8)
    async with MockCluster(1, 1, lease_s=3.0) as cluster:
        cluster.of(Role.DECODE)[0].engine.hang(4.5)
        answer = await cluster.ask(PROMPT, 8)
        await cluster.wait_empty()
    assert answer.token_ids == expected
    assert answer.trace.kv_outcome == "pulled"


@pytest.mark.parametrize("path", [Path.REMOTE_EARLY, Path.REMOTE])
async def test_a_decode_worker_that_dies_before_its_first_token_is_replaced(path: Path) -> None:
    expected = await answers_of_one_worker(PROMPT, 8)
    async with MockCluster(1, 2, lease_s=1.0) as cluster:
        for worker in cluster.of(Role.DECODE):
            worker.engine.hang(0.6)
        asking = asyncio.create_task(cluster.ask(PROMPT, 8, path))
        busy = await first_of(cluster.of(Role.DECODE), lambda worker: worker.gate.num_inside)
        await busy.kill()
        answer = await asking
        # Nobody can know that the dead worker reads no more: its blocks are freed by their lease.
        await cluster.wait_empty()
    assert answer.token_ids == expected
    assert answer.trace.fallbacks == ("resumed" if path is Path.REMOTE_EARLY else "decode_retry",)


async def test_without_decode_workers_there_is_a_clear_error_and_nothing_stays() -> None:
    async with MockCluster(1, 1) as cluster:
        await cluster.publish(leave_out=tuple(cluster.of(Role.DECODE)))
        with pytest.raises(NoWorkerAvailable):
            await cluster.ask(PROMPT, 8)
        await cluster.wait_empty()


async def test_a_draining_worker_is_asked_nothing_new_and_finishes_what_it_has() -> None:
    async with MockCluster(1, 2) as cluster:
        asking = asyncio.create_task(cluster.ask(PROMPT, 100))
        busy = await first_of(cluster.of(Role.DECODE), lambda worker: worker.gate.num_inside)
        draining = asyncio.create_task(busy.gate.drain(5.0))
        await asyncio.sleep(0)
        answers = await asyncio.gather(*(cluster.ask(PROMPT, 4) for _ in range(6)))
        assert all(answer.trace.decode_worker != busy.worker_id for answer in answers)
        assert len((await asking).token_ids) == 100
        assert await draining


async def test_cancelling_at_any_moment_leaves_nothing_on_any_worker() -> None:
    expected = {n: await answers_of_one_worker(PROMPT[:n], 12) for n in (5, 50, 100)}
    moments = random.Random(7)
    async with MockCluster(2, 2) as cluster:
        tasks_before = len(asyncio.all_tasks())

        async def one(number: int) -> None:
            length = (5, 50, 100)[number % 3]
            path = (Path.REMOTE_EARLY, Path.REMOTE, Path.LOCAL)[number // 3 % 3]
            asking = asyncio.create_task(cluster.ask(PROMPT[:length], 12, path))
            if number % 2:
                await asyncio.sleep(moments.random() * 0.08)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            else:
                assert (await asking).token_ids == expected[length]

        for _ in range(4):
            await asyncio.gather(*(one(number) for number in range(60)))
        await cluster.wait_empty()
        async with asyncio.timeout(10):
            while len(asyncio.all_tasks()) > tasks_before:  # noqa: ASYNC110  a task says nothing when it ends
                await asyncio.sleep(0.02)
        for worker in cluster.workers:
            assert worker.engine.load().num_pinned == 0
