"""Answers that lose their worker on the way, on mock engines: nothing is repeated, nothing lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from core.errors import NoWorkerAvailable, WorkerLost
from core.request import Path
from core.types import Role
from engine.base import EngineDelta
from router import circuit_breaker
from router.admission_limits import AdmissionLimits
from tests.integration.mock_workers import STEP_TIME, Answer, MockCluster, MockWorker

PROMPT = list(range(1000, 1100))
LONG = 60
SLOW = {"step_time": replace(STEP_TIME, decode_base_ms=15.0)}
"""So that what is to happen in the middle of an answer happens there, however busy the machine is."""


class Cluster(MockCluster):
    def __init__(self, num_prefill: int, num_decode: int, **settings: Any) -> None:
        super().__init__(num_prefill, num_decode, engine=SLOW, **settings)


async def answer_of_one_worker(num_tokens: int = LONG) -> list[int]:
    async with MockCluster(0, 1) as alone:
        return (await alone.ask(PROMPT, num_tokens, Path.LOCAL)).token_ids


def decoding(cluster: MockCluster) -> MockWorker:
    return next(worker for worker in cluster.workers if worker.engine.load().num_decoding)


async def ask_and(
    cluster: MockCluster, what: Callable[[MockWorker], Any], *, after: tuple[int, ...] = (10,), **request: Any
) -> Answer:
    """Asks, and does ``what`` to the worker that decodes as soon as so many tokens are here."""
    num_seen, doing, moments = 0, [], list(after)

    def emit(delta: EngineDelta) -> None:
        nonlocal num_seen
        num_seen += len(delta.token_ids)
        if moments and num_seen >= moments[0]:
            moments.pop(0)
            doing.append(asyncio.ensure_future(what(decoding(cluster))))

    answer = await cluster.ask(PROMPT, request.pop("max_tokens", LONG), emit=emit, **request)
    await asyncio.gather(*doing)
    return answer


async def kill(worker: MockWorker) -> None:
    await worker.kill()


async def hang(worker: MockWorker) -> None:
    worker.engine.hang(1.0)


@pytest.mark.parametrize("path", [Path.REMOTE_EARLY, Path.REMOTE, Path.LOCAL])
@pytest.mark.parametrize("history", [False, True], ids=["continued", "replayed"])
async def test_an_answer_goes_on_where_its_worker_died(path: Path, history: bool) -> None:
    expected = await answer_of_one_worker()
    async with Cluster(1, 2) as cluster:
        answer = await ask_and(cluster, kill, path=path, depends_on_output_history=history)
        await cluster.wait_empty()
    assert answer.token_ids == expected
    assert answer.finish_reason == "length"
    (resumption,) = answer.trace.resumptions
    assert resumption.replayed is history
    assert resumption.num_tokens >= 10
    assert resumption.lost_worker != answer.trace.decode_worker
    assert resumption.pause_s is not None
    assert answer.trace.fallbacks == ("resumed",)


async def test_it_can_lose_one_worker_after_another() -> None:
    expected = await answer_of_one_worker()
    async with Cluster(1, 4) as cluster:
        answer = await ask_and(cluster, kill, after=(5, 15, 25))
        await cluster.wait_empty()
    assert answer.token_ids == expected
    lost = [resumption.lost_worker for resumption in answer.trace.resumptions]
    assert len(set(lost)) == 3


async def test_a_request_that_kills_its_workers_does_not_kill_them_all() -> None:
    async with Cluster(0, 6, max_retries=2) as cluster:
        with pytest.raises(WorkerLost, match="too often"):
            await ask_and(cluster, kill, after=(5, 10, 15, 20, 25, 30))
        assert sum(worker.engine.dead for worker in cluster.workers) == 3


async def test_a_worker_that_falls_silent_is_left_after_the_stall_timeout() -> None:
    expected = await answer_of_one_worker()
    async with Cluster(1, 2, stall_timeout_s=0.3) as cluster:
        answer = await ask_and(cluster, hang)
        await cluster.wait_empty()  # when it comes round it has been told to drop the request
    assert answer.token_ids == expected
    assert answer.trace.resumptions


async def test_a_worker_late_with_its_first_token_is_left_after_the_prefill_timeout() -> None:
    expected = await answer_of_one_worker(8)
    async with Cluster(0, 2, stall_timeout_s=5.0, prefill_timeout_s=0.3, resume_timeout_s=20.0) as cluster:
        first, second = cluster.workers
        asking = asyncio.create_task(cluster.ask(PROMPT, 8, Path.LOCAL))
        for worker in (first, second):
            worker.engine.hang(0.4)
        answer = await asking
        await cluster.wait_empty()
    assert answer.token_ids == expected
    assert answer.trace.fallbacks[-1] == "decode_retry"


async def test_where_no_decode_worker_is_left_a_prefill_worker_decodes() -> None:
    expected = await answer_of_one_worker()
    async with Cluster(1, 1) as cluster:
        answer = await ask_and(cluster, kill)
        (prefill,) = cluster.of(Role.PREFILL)
    assert answer.token_ids == expected
    assert answer.trace.decode_worker == prefill.worker_id
    assert answer.trace.decisions[-1].reason == "last_resort"


async def test_where_nobody_is_left_a_new_worker_is_waited_for() -> None:
    expected = await answer_of_one_worker()
    async with Cluster(0, 2) as cluster:
        spare = cluster.workers[1]
        await cluster.publish(leave_out=(spare,))

        async def kill_and_replace(worker: MockWorker) -> None:
            await worker.kill()
            await asyncio.sleep(0.3)
            await cluster.publish(leave_out=(worker,))

        answer = await ask_and(cluster, kill_and_replace)
    assert answer.token_ids == expected
    assert answer.trace.decode_worker == spare.worker_id


async def test_who_waits_for_nobody_is_told_so_in_time() -> None:
    async with Cluster(0, 1, resume_timeout_s=0.5) as cluster:
        started_s = cluster.clock.now_s()
        with pytest.raises(NoWorkerAvailable):
            await ask_and(cluster, kill)
        assert cluster.clock.now_s() - started_s < 20.0


async def test_what_engines_cannot_replay_ends_with_the_reason() -> None:
    async with Cluster(0, 2, replays=False) as cluster:
        with pytest.raises(WorkerLost, match="speculative decoding"):
            await ask_and(cluster, kill, depends_on_output_history=True)


async def test_an_answer_never_goes_on_with_other_weights() -> None:
    cluster = Cluster(0, 2, resume_timeout_s=0.3)
    cluster.workers[0].revision, cluster.workers[1].revision = "old", "new"
    async with cluster:
        with pytest.raises(NoWorkerAvailable):
            await ask_and(cluster, kill)


async def test_a_worker_that_loses_requests_is_passed_over_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE_S", 60.0)
    async with Cluster(0, 2, prefill_timeout_s=1.0) as cluster:
        failing, well = cluster.workers
        failing.engine.hang(60)
        answers = await asyncio.gather(*(cluster.ask(PROMPT, 4, Path.LOCAL) for _ in range(12)))
        assert {answer.trace.decode_worker for answer in answers} == {well.worker_id}
        member = cluster.view.member(failing.worker_id)
        assert member is not None
        assert member.breaker.num_opened == 1
        later = [await cluster.ask(PROMPT, 2, Path.LOCAL) for _ in range(6)]
        assert all(answer.trace.fallbacks == () for answer in later)


async def test_every_answer_of_a_worker_that_dies_goes_on() -> None:
    expected = await answer_of_one_worker(200)
    async with Cluster(1, 3, lease_s=1.0) as cluster:
        asking = [asyncio.create_task(cluster.ask(PROMPT, 200)) for _ in range(30)]
        async with asyncio.timeout(20):
            while not decoding_many(cluster, 6):  # noqa: ASYNC110  engines say nothing when they begin
                await asyncio.sleep(0.005)
        await max(cluster.of(Role.DECODE), key=lambda w: w.engine.load().num_decoding).kill()
        answers = await asyncio.gather(*asking)
        await cluster.wait_empty()
    assert all(answer.token_ids == expected for answer in answers)
    assert sum(len(answer.trace.resumptions) for answer in answers) >= 6


def decoding_many(cluster: MockCluster, number: int) -> bool:
    return any(worker.engine.load().num_decoding >= number for worker in cluster.of(Role.DECODE))


async def test_an_answer_goes_back_to_a_worker_whose_connection_broke_if_there_is_no_other() -> None:
    expected = await answer_of_one_worker()
    async with Cluster(0, 1) as cluster:
        (only,) = cluster.workers
        member = cluster.view.member(only.worker_id)
        assert member is not None

        async def cut(worker: MockWorker) -> None:
            member.link._lose_all("cut by the test")

        answer = await ask_and(cluster, cut)
        await cluster.wait_empty()
    assert answer.token_ids == expected
    assert answer.trace.decode_worker == only.worker_id


async def test_an_answer_that_has_begun_waits_until_a_full_worker_has_room() -> None:
    expected = await answer_of_one_worker()
    async with Cluster(0, 2, max_requests=1, resume_timeout_s=20.0) as cluster:
        others = [asyncio.create_task(cluster.ask(PROMPT, 200, Path.LOCAL)) for _ in range(1)]
        async with asyncio.timeout(10):
            while not decoding_many(cluster, 1):  # noqa: ASYNC110  engines say nothing when they begin
                await asyncio.sleep(0.005)
        busy = decoding(cluster)

        async def kill_the_other(worker: MockWorker) -> None:
            await next(each for each in cluster.workers if each is not busy).kill()

        answer = await ask_and(cluster, kill_the_other)
        await asyncio.gather(*others)
    assert answer.token_ids == expected
    assert answer.trace.decode_worker == busy.worker_id


async def test_a_request_without_a_token_is_not_tied_to_the_weights_it_was_sent_to() -> None:
    async with MockCluster(0, 1) as new:
        expected = (await new.ask(PROMPT, 8, Path.LOCAL)).token_ids
    cluster = Cluster(0, 2)
    cluster.workers[0].revision, cluster.workers[1].revision = "old", "new"
    async with cluster:
        for worker in cluster.workers:
            worker.engine.hang(0.5)
        asking = [asyncio.create_task(cluster.ask(PROMPT, 8, Path.LOCAL)) for _ in range(6)]
        await asyncio.sleep(0.2)
        await cluster.workers[0].kill()
        answers = await asyncio.gather(*asking)
    assert all(answer.token_ids == expected for answer in answers)
    assert {answer.trace.decode_worker for answer in answers} == {cluster.workers[1].worker_id}


async def test_a_request_cancelled_just_as_it_is_let_in_counts_nowhere_any_more() -> None:
    async with MockCluster(1, 1, limits=AdmissionLimits(), step_time=STEP_TIME) as cluster:
        moments = random.Random(3)
        asking = [asyncio.create_task(cluster.ask(PROMPT, 30)) for _ in range(20)]
        for _ in range(200):
            await asyncio.sleep(0)
            for task in asking:
                if not task.done() and moments.random() < 0.02:
                    task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await cluster.wait_empty()
        for worker in cluster.workers:
            member = cluster.view.member(worker.worker_id)
            assert member is not None
            assert member.view.candidate().own_prefills == 0
