"""The predicting policy: caches against queues, TPOT headroom, prefills where they are decoded."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from core.errors import NoWorkerAvailable
from core.performance_model import LinearStepTime
from core.types import Role
from router.policy_predictive import PredictivePolicy
from router.routing import Candidate, RoutingRequest

STEP_TIME = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.1,
    prefill_base_ms=10.0,
    decode_base_ms=10.0,
    decode_ms_per_seq=0.1,
    decode_ms_per_kv_token=1e-4,
)
"""A prompt of 1000 tokens takes 110 ms."""
IDLE = Candidate(
    worker_id="",
    role=Role.PREFILL,
    num_requests=0,
    waiting_prefill_tokens=0,
    kv_used_tokens=0,
    kv_capacity_tokens=100_000,
    step_time=STEP_TIME,
)
NOW_S = 100.0
REQUEST = RoutingRequest(prompt_tokens=1000, now_s=NOW_S, ttft_slo_s=0.5, tpot_slo_s=0.02)


def prefill(worker_id: str, busy_s: float = 0.0) -> Candidate:
    return replace(IDLE, worker_id=worker_id, prefill_free_at_s=NOW_S + busy_s)


def decode(worker_id: str, **changes: float) -> Candidate:
    return replace(IDLE, worker_id=worker_id, role=Role.DECODE, **changes)  # type: ignore[arg-type]


@pytest.fixture
def policy() -> PredictivePolicy:
    return PredictivePolicy(random_seed=1)


class TestPrefill:
    def test_ttft_is_the_queue_the_uncached_tokens_and_what_was_waited(
        self, policy: PredictivePolicy
    ) -> None:
        request = replace(REQUEST, waited_s=0.05, cached_tokens={"p1": 600})
        decision = policy.choose([prefill("p1", busy_s=0.1), decode("d")], request)
        assert decision.prefill_worker == "p1"
        assert decision.ttft_s == pytest.approx(0.05 + 0.1 + 0.05)

    def test_a_cache_hit_is_worth_a_short_queue_and_not_a_long_one(self, policy: PredictivePolicy) -> None:
        request = replace(REQUEST, cached_tokens={"hit": 900})
        short = [prefill("hit", busy_s=0.08), prefill("idle"), decode("d")]
        long = [prefill("hit", busy_s=0.4), prefill("idle"), decode("d")]
        assert policy.choose(short, request).prefill_worker == "hit"
        assert policy.choose(long, request).prefill_worker == "idle"

    def test_a_queue_that_is_over_counts_for_nothing(self, policy: PredictivePolicy) -> None:
        decision = policy.choose([prefill("p1", busy_s=-5.0), decode("d")], REQUEST)
        assert decision.ttft_s == pytest.approx(0.11)

    def test_equal_workers_share_the_load(self, policy: PredictivePolicy) -> None:
        candidates = [prefill("p1"), prefill("p2"), decode("d1"), decode("d2")]
        decisions = [policy.choose(candidates, REQUEST) for _ in range(400)]
        assert Counter(decision.prefill_worker for decision in decisions)["p1"] == pytest.approx(200, abs=50)
        assert Counter(decision.decode_worker for decision in decisions)["d1"] == pytest.approx(200, abs=50)


class TestDecode:
    def test_the_shortest_step_wins(self, policy: PredictivePolicy) -> None:
        candidates = [prefill("p"), decode("busy", num_requests=40), decode("calm", num_requests=2)]
        decision = policy.choose(candidates, REQUEST)
        assert decision.decode_worker == "calm"
        assert decision.tpot_s == pytest.approx((10 + 0.3 + 0.1) / 1e3)

    def test_a_worker_without_room_is_the_last_resort(self, policy: PredictivePolicy) -> None:
        full = decode("full", kv_used_tokens=99_500)
        assert (
            policy.choose([prefill("p"), full, decode("busy", num_requests=90)], REQUEST).decode_worker
            == "busy"
        )
        assert policy.choose([prefill("p"), full], REQUEST).decode_worker == "full"

    def test_without_a_decode_worker_there_is_no_decision(self, policy: PredictivePolicy) -> None:
        with pytest.raises(NoWorkerAvailable, match="decode"):
            policy.choose([prefill("p")], REQUEST)


class TestLocalPrefill:
    def test_prefill_workers_in_time_are_used(self, policy: PredictivePolicy) -> None:
        assert policy.choose([prefill("p", busy_s=0.2), decode("d")], REQUEST).prefill_worker == "p"

    def test_late_ones_are_passed_over_while_the_decode_worker_keeps_its_target(
        self, policy: PredictivePolicy
    ) -> None:
        late = prefill("p", busy_s=2.0)
        assert policy.choose([late, decode("d")], REQUEST).prefill_worker is None
        assert policy.choose([late, decode("d", local_prefill_share=0.6)], REQUEST).prefill_worker == "p"
        assert policy.choose([late, decode("d", num_requests=90)], REQUEST).prefill_worker == "p"
        assert policy.choose([late, decode("d", prefill_free_at_s=NOW_S + 3)], REQUEST).prefill_worker == "p"

    def test_a_prompt_that_is_mostly_cached_where_it_is_decoded_stays_there(
        self, policy: PredictivePolicy
    ) -> None:
        request = replace(REQUEST, cached_tokens={"d2": 960})
        decision = policy.choose([prefill("p"), decode("d1"), decode("d2")], request)
        assert (decision.prefill_worker, decision.decode_worker) == (None, "d2")
        assert decision.reason == "local"

    def test_without_a_prefill_worker_it_is_the_only_way(self, policy: PredictivePolicy) -> None:
        decision = policy.choose([decode("d", local_prefill_share=0.9)], REQUEST)
        assert (decision.prefill_worker, decision.reason) == (None, "no_prefill_worker")


def test_one_token_answers_go_where_the_first_token_comes_soonest(policy: PredictivePolicy) -> None:
    candidates = [prefill("p1", busy_s=1.0), prefill("p2"), decode("d")]
    assert policy.choose_prefill_only(candidates, REQUEST) == "p2"
    assert policy.choose_prefill_only([decode("d")], REQUEST) == "d"
    with pytest.raises(NoWorkerAvailable):
        policy.choose_prefill_only([], REQUEST)


def test_where_nobody_knows_how_long_steps_take_load_decides(policy: PredictivePolicy) -> None:
    candidates = [
        replace(prefill("p1"), step_time=None, waiting_prefill_tokens=500),
        replace(prefill("p2"), step_time=None),
        decode("d"),
    ]
    decision = policy.choose(candidates, REQUEST)
    assert (decision.prefill_worker, decision.ttft_s) == ("p2", None)
