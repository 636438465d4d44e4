"""Placing and admission over real gRPC and mock engines: caches, lines, refusals, and nothing left behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from core.errors import Rejected
from core.request import Path
from core.types import Role
from router.admission_limits import AdmissionLimits
from tests.integration.mock_workers import STEP_TIME, MockCluster

LONG = 20_000
"""Prompt tokens that a worker computes for 0.4 s."""


def prompt(number: int, num_tokens: int = LONG) -> list[int]:
    return [number] * num_tokens


def cluster_of(num_prefill: int, num_decode: int, **settings: Any) -> MockCluster:
    settings = {"policy": "predictive", "step_time": STEP_TIME, "limits": AdmissionLimits()} | settings
    return MockCluster(num_prefill, num_decode, **settings)


async def waiting(cluster: MockCluster, count: int) -> None:
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while cluster.relay.num_waiting != count:  # noqa: ASYNC110  the gate says nothing to a test
            await asyncio.sleep(0.005)


async def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    async with cluster_of(4, 1) as cluster:
        first = await cluster.ask(prompt(1), 4)
        for _ in range(4):
            again = await cluster.ask([*prompt(1), *range(500)], 4)
            assert again.trace.prefill_worker == first.trace.prefill_worker
        other = {(await cluster.ask(prompt(n), 4)).trace.prefill_worker for n in range(2, 12)}
    assert len(other) > 1


async def test_a_short_prompt_does_not_wait_for_a_busy_prefill_worker() -> None:
    async with cluster_of(1, 1) as cluster:
        long = asyncio.create_task(cluster.ask(prompt(2), 4))
        await asyncio.sleep(0)
        short = await cluster.ask(prompt(1, 50), 4, ttft_slo_s=0.2)
        assert not long.done()
        assert (await long).trace.path is Path.REMOTE_EARLY
    assert (short.trace.path, short.trace.decisions[0].reason) == (Path.LOCAL, "local")
    assert short.trace.fallbacks == ()


async def test_what_has_no_room_waits_here_and_not_at_the_worker() -> None:
    async with cluster_of(1, 1) as cluster:
        (prefill,) = cluster.of(Role.PREFILL)
        asking = [asyncio.create_task(cluster.ask(prompt(n), 2)) for n in range(6)]
        await waiting(cluster, 5)
        while cluster.relay.num_waiting == 5:
            assert prefill.gate.num_inside <= 1
            await asyncio.sleep(0.005)
        answers = await asyncio.gather(*asking)
        await cluster.wait_empty()
    assert all(len(answer.token_ids) == 2 for answer in answers)
    assert not any(answer.trace.fallbacks for answer in answers)


async def test_the_urgent_one_goes_first_and_the_rest_by_deadline() -> None:
    async with cluster_of(1, 1, limits=AdmissionLimits(early_rejection=False)) as cluster:
        sent_at_s: dict[str, float] = {}

        async def ask(name: str, number: int, num_tokens: int = LONG // 2, **request: Any) -> None:
            answer = await cluster.ask(prompt(number, num_tokens), 1, Path.PREFILL_ONLY, **request)
            sent_at_s[name] = answer.trace.prefill_sent_at_s

        asking = [asyncio.create_task(ask("running", 0, 30_000))]
        await asyncio.sleep(0)
        asking.append(asyncio.create_task(ask("patient", 1, ttft_slo_s=60.0)))
        asking.append(asyncio.create_task(ask("hurried", 2, ttft_slo_s=10.0)))
        asking.append(asyncio.create_task(ask("urgent", 3, priority=-1, ttft_slo_s=60.0)))
        await waiting(cluster, 3)
        await asyncio.gather(*asking)
    assert sorted(sent_at_s, key=sent_at_s.__getitem__) == ["running", "urgent", "hurried", "patient"]


async def test_what_would_be_late_is_refused_and_never_reaches_a_worker() -> None:
    async with cluster_of(1, 1) as cluster:
        asking = [asyncio.create_task(cluster.ask(prompt(n), 2, ttft_slo_s=1.5)) for n in range(12)]
        results = await asyncio.gather(*asking, return_exceptions=True)
        await cluster.wait_empty()
    refused = [result for result in results if isinstance(result, Rejected)]
    served = [result for result in results if not isinstance(result, BaseException)]
    assert len(refused) + len(served) == 12
    assert 1 <= len(served) <= 4
    assert all(error.status in (429, 503) and error.retry_after_s >= 1 for error in refused)
    assert all(len(answer.token_ids) == 2 for answer in served)


async def test_a_client_that_goes_away_leaves_the_line() -> None:
    async with cluster_of(1, 1) as cluster:
        asking = [asyncio.create_task(cluster.ask(prompt(n), 2)) for n in range(4)]
        await waiting(cluster, 3)
        for task in asking[1:3]:
            task.cancel()
        await asyncio.gather(*asking[1:3], return_exceptions=True)
        assert cluster.relay.num_waiting == 1
        await asyncio.gather(asking[0], asking[3])
        await cluster.wait_empty()
        for member in cluster.view.members():
            assert member.view.candidate().waiting_prefill_tokens == 0


async def test_a_worker_that_dies_makes_the_line_go_on_elsewhere() -> None:
    async with cluster_of(2, 1, prefill_timeout_s=2.0) as cluster:
        asking = [asyncio.create_task(cluster.ask(prompt(n), 2)) for n in range(6)]
        await waiting(cluster, 4)
        await cluster.of(Role.PREFILL)[0].kill()
        answers = await asyncio.gather(*asking)
        await cluster.wait_empty()
    assert all(len(answer.token_ids) == 2 for answer in answers)


async def test_a_policy_that_stumbles_does_not_stop_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster_of(1, 1) as cluster:
        asking = [asyncio.create_task(cluster.ask(prompt(n), 2)) for n in range(3)]
        await waiting(cluster, 2)
        policy, choose, failures = cluster.relay._placing.policy, cluster.relay._placing.policy.choose, [3]

        def stumble(*args: Any) -> Any:
            failures[0] -= 1
            if failures[0] >= 0:
                raise ZeroDivisionError
            return choose(*args)

        monkeypatch.setattr(policy, "choose", stumble)
        answers = await asyncio.gather(*asking)
    assert failures[0] < 0
    assert all(len(answer.token_ids) == 2 for answer in answers)


@pytest.mark.parametrize("policy", ["predictive", "least_load", "round_robin"])
async def test_a_decision_says_what_it_was_made_from(policy: str) -> None:
    async with cluster_of(2, 2, policy=policy) as cluster:
        quiet = await cluster.ask(prompt(1), 2)
        answer = await cluster.ask(prompt(1), 2, explain=True)
    assert quiet.trace.explanations == []
    (explanation,) = answer.trace.as_dict()["explanations"]
    assert explanation["decision"]["prefill_worker"] == answer.trace.prefill_worker
    assert len(explanation["candidates"]) == 4
    by_id = {row["worker_id"]: row for row in explanation["candidates"]}
    chosen = by_id[answer.trace.prefill_worker]
    if policy == "predictive":
        assert chosen["cached_tokens"] == LONG // 16 * 16 - 16
        assert chosen["score"] == min(
            row["score"] for row in explanation["candidates"] if row["role"] == "prefill"
        )
        assert explanation["decision"]["ttft_s"] == pytest.approx(
            explanation["waited_s"] + chosen["queue_s"] + chosen["prefill_s"], 1e-3
        )


def told(cluster: MockCluster) -> tuple[int, int]:
    """Prompt tokens that the planner hears have been sent, and those expected in caches."""
    summary = cluster.traffic.summary(num_waiting=0, waiting_prompt_tokens=0, num_ongoing=0)
    return sum(summary.placed_tokens), sum(summary.cached_tokens)


async def test_the_planner_hears_what_was_sent_and_how_much_of_it_is_cached() -> None:
    async with cluster_of(2, 1) as cluster:
        await cluster.ask(prompt(1), 4)
        assert told(cluster) == (LONG, 0)
        await cluster.ask([*prompt(1), *range(500)], 4)
        placed, cached = told(cluster)
        assert placed == 2 * LONG + 500
        assert LONG - 32 <= cached <= LONG


async def test_the_planner_hears_of_a_request_once_however_often_it_is_sent() -> None:
    async with MockCluster(2, 1, limits=None) as cluster:
        cluster.of(Role.PREFILL)[0].engine.kill()
        traces = [(await cluster.ask(prompt(n, 100), 4)).trace for n in range(4)]
        assert any(trace.fallbacks for trace in traces)
        assert told(cluster) == (400, 0)


async def test_what_waits_is_told_in_prompt_tokens_and_not_as_sent() -> None:
    async with cluster_of(1, 1) as cluster:
        asking = [asyncio.create_task(cluster.ask(prompt(n), 2)) for n in range(4)]
        await waiting(cluster, 3)
        assert cluster.relay.waiting_prompt_tokens == 3 * LONG
        assert told(cluster)[0] == LONG
        await asyncio.gather(*asking)
        assert cluster.relay.waiting_prompt_tokens == 0
        assert told(cluster)[0] == 4 * LONG


async def test_a_worker_that_has_just_left_counts_for_nothing_it_had_cached() -> None:
    async with MockCluster(2, 1, policy="predictive", step_time=STEP_TIME) as cluster:
        prompt = list(range(2000, 2200))
        left = cluster.workers[0]
        for _ in range(6):
            await cluster.ask(prompt, 2)
        snapshot = cluster.view.snapshot
        assert snapshot is not None
        others = tuple(worker.report for worker in cluster.workers if worker is not left)
        gone = cluster.view.update(replace(snapshot, epoch=snapshot.epoch + 1, workers=others))
        answer = await cluster.ask(prompt, 2)  # before anybody has closed the one that left
        assert answer.trace.prefill_worker != left.worker_id
        for member in gone:
            await member.close()
