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


class TestCachesThatAreFull:
    """What a worker without free room would evict is worth something, but not a wait in line."""

    @staticmethod
    def full(worker_id: str, busy_s: float = 0.0) -> Candidate:
        return replace(prefill(worker_id, busy_s), cache_free_tokens=0, cache_oldest_at_s=NOW_S - 60.0)

    @staticmethod
    def empty(worker_id: str, busy_s: float = 0.0) -> Candidate:
        return replace(prefill(worker_id, busy_s), cache_free_tokens=100_000, cache_oldest_at_s=NOW_S - 60.0)

    def test_an_empty_cache_is_filled_first(self, policy: PredictivePolicy) -> None:
        candidates = [self.full("old"), self.empty("new", busy_s=0.09), decode("d")]
        assert policy.choose(candidates, REQUEST).prefill_worker == "new"

    def test_nobody_waits_for_it_while_another_worker_is_idle(self, policy: PredictivePolicy) -> None:
        candidates = [self.full("old"), self.empty("new", busy_s=0.11), decode("d")]
        assert policy.choose(candidates, REQUEST).prefill_worker == "old"

    def test_a_session_stays_where_that_is_about_as_good(self, policy: PredictivePolicy) -> None:
        long = replace(REQUEST, prompt_tokens=3000)
        near = [prefill("p1"), prefill("p2", busy_s=0.11), decode("d")]
        sessions = [replace(long, cached_tokens={"p2": 1000}, session=f"s{n}") for n in range(40)]
        assert {policy.choose(near, session).prefill_worker for session in sessions} == {"p1", "p2"}

    def test_where_all_are_busy_it_comes_first_again(self, policy: PredictivePolicy) -> None:
        candidates = [self.full("old", busy_s=0.25), self.empty("new", busy_s=0.25), decode("d")]
        assert policy.choose(candidates, REQUEST).prefill_worker == "new"


class TestLateEverywhere:
    """A prompt of 10,000 tokens takes a second, the target is half of one."""

    LONG = replace(REQUEST, prompt_tokens=10_000)

    def test_it_takes_the_soonest_worker_while_all_others_are_idle(self, policy: PredictivePolicy) -> None:
        candidates = [prefill("late", busy_s=2.0), prefill("p1"), prefill("p2"), decode("d")]
        assert policy.choose(candidates, self.LONG).prefill_worker in ("p1", "p2")

    def test_it_stays_away_from_workers_in_time_that_others_need(self, policy: PredictivePolicy) -> None:
        candidates = [
            prefill("later", busy_s=9.0),
            prefill("late", busy_s=2.0),
            prefill("p1", busy_s=0.1),
            prefill("p2", busy_s=0.1),
            decode("d"),
        ]
        assert policy.choose(candidates, self.LONG).prefill_worker == "later"
        one_left = [prefill("late", busy_s=2.0), prefill("p1"), decode("d")]
        assert policy.choose(one_left, self.LONG).prefill_worker == "late"

    def test_it_does_not_wait_for_ever(self, policy: PredictivePolicy) -> None:
        candidates = [prefill("endless", busy_s=40.0), prefill("long", busy_s=20.0), decode("d")]
        assert policy.choose(candidates, self.LONG).prefill_worker == "long"
        only_endless = [prefill("p1", busy_s=50.0), prefill("p2", busy_s=40.0), decode("d")]
        assert policy.choose(only_endless, self.LONG).prefill_worker == "p2"

    def test_a_decode_worker_does_not_prefill_it(self, policy: PredictivePolicy) -> None:
        candidates = [prefill("p", busy_s=2.0), decode("d")]
        assert policy.choose(candidates, self.LONG).prefill_worker == "p"

    def test_a_prompt_that_can_be_in_time_goes_where_it_is(self, policy: PredictivePolicy) -> None:
        candidates = [prefill("late", busy_s=2.0), prefill("p", busy_s=0.1), decode("d")]
        assert policy.choose(candidates, REQUEST).prefill_worker == "p"


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

    def test_a_cached_prefix_saves_a_handoff(self, policy: PredictivePolicy) -> None:
        request = replace(REQUEST, cached_tokens={"has": 800})
        has, lacks = decode("has", kv_bytes_per_token=10**6), decode("lacks", kv_bytes_per_token=10**6)
        decisions = [policy.choose([prefill("p"), has, lacks], request) for _ in range(20)]
        assert {decision.decode_worker for decision in decisions} == {"has"}

    def test_prompts_that_a_worker_prefills_itself_stretch_its_steps(self, policy: PredictivePolicy) -> None:
        candidates = [prefill("p"), decode("prefills", local_prefill_share=0.3), decode("d", num_requests=9)]
        assert policy.choose(candidates, REQUEST).decode_worker == "d"

    def test_where_none_keeps_its_target_the_slowest_takes_the_excess(self, policy: PredictivePolicy) -> None:
        over, far_over = decode("over", num_requests=95), decode("far over", num_requests=150)
        assert policy.choose([prefill("p"), over, far_over], REQUEST).decode_worker == "far over"
        too_far = decode("too far", num_requests=400)
        assert policy.choose([prefill("p"), over, far_over, too_far], REQUEST).decode_worker == "far over"
        in_time = decode("in time", num_requests=50)
        assert policy.choose([prefill("p"), far_over, in_time], REQUEST).decode_worker == "in time"

    def test_what_is_late_anyway_joins_the_slowest(self, policy: PredictivePolicy) -> None:
        candidates = [
            prefill("p", busy_s=9.0),
            decode("over", num_requests=95),
            decode("in time", num_requests=50),
        ]
        assert policy.choose(candidates, replace(REQUEST, waited_s=1.0)).decode_worker == "over"

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

    def test_a_prompt_is_not_prefilled_late_on_a_decode_worker(self, policy: PredictivePolicy) -> None:
        later = decode("d", prefill_free_at_s=NOW_S + 1.0)
        assert policy.choose([prefill("p", busy_s=2.0), later], REQUEST).prefill_worker == "p"

    def test_a_short_prompt_that_nobody_has_cached_is_prefilled_elsewhere(
        self, policy: PredictivePolicy
    ) -> None:
        candidates = [prefill("p", busy_s=0.1), decode("d")]
        assert policy.choose(candidates, replace(REQUEST, prompt_tokens=10)).prefill_worker == "p"

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


class TestSession:
    def test_it_stays_with_its_workers_while_that_costs_next_to_nothing(
        self, policy: PredictivePolicy
    ) -> None:
        workers = [prefill(f"p{n}") for n in range(6)] + [decode(f"d{n}") for n in range(6)]
        homes = []
        for number in range(40):
            request = replace(REQUEST, session=str(number))
            decisions = [policy.choose(workers, request) for _ in range(10)]
            (home,) = {(decision.prefill_worker, decision.decode_worker) for decision in decisions}
            homes.append(home)
        assert len(set(homes)) > 10

    def test_every_router_knows_its_workers(self) -> None:
        workers = [prefill(f"p{n}") for n in range(6)] + [decode("d")]
        request = replace(REQUEST, session="one")
        routers = [PredictivePolicy(random_seed=seed) for seed in range(5)]
        assert len({router.choose(workers, request).prefill_worker for router in routers}) == 1

    def test_it_leaves_a_worker_that_is_busy_and_comes_back(self, policy: PredictivePolicy) -> None:
        request = replace(REQUEST, session="one")
        workers = [prefill(f"p{n}") for n in range(3)] + [decode("d")]
        home = policy.choose(workers, request).prefill_worker
        busy = [replace(w, prefill_free_at_s=NOW_S + 5) if w.worker_id == home else w for w in workers]
        assert policy.choose(busy, request).prefill_worker != home
        assert policy.choose(workers, request).prefill_worker == home


class TestTopology:
    def test_the_same_node_comes_first_while_it_is_about_as_busy(self, policy: PredictivePolicy) -> None:
        def on(worker: Candidate, node_id: str) -> Candidate:
            return replace(worker, node_id=node_id, kv_bytes_per_token=100_000)

        near, far = on(decode("near", num_requests=5), "n1"), on(decode("far"), "n2")
        workers = [on(prefill("p"), "n1"), near, far]
        long = replace(REQUEST, prompt_tokens=4000)
        assert policy.choose(workers, long).decode_worker == "near"
        busier = replace(near, num_requests=60)
        assert policy.choose([workers[0], busier, far], long).decode_worker == "far"
        unknown = [replace(worker, node_id="") for worker in workers]
        assert policy.choose(unknown, long).decode_worker == "far"


class TestLeftoverAnswers:
    """After a role switch a prefill worker still has answers to finish; a prompt makes them stand still."""

    MANY, FEW = 60, 4

    @staticmethod
    def switched(worker_id: str, num_answers: int, busy_s: float = 0.0, kv_tokens: int = 0) -> Candidate:
        return replace(prefill(worker_id, busy_s), num_decoding=num_answers, kv_used_tokens=kv_tokens)

    def test_it_is_passed_over_while_another_is_in_time(self, policy: PredictivePolicy) -> None:
        workers = [self.switched("old", self.MANY), prefill("p", busy_s=0.25), decode("d")]
        decisions = [policy.choose(workers, REQUEST) for _ in range(20)]
        assert {decision.prefill_worker for decision in decisions} == {"p"}

    def test_it_helps_out_when_the_others_are_late_and_its_answers_keep_their_target(
        self, policy: PredictivePolicy
    ) -> None:
        busy_decode = decode("d", num_requests=90)  # has no time for prompts
        workers = [self.switched("old", self.MANY), prefill("p", busy_s=3.0), busy_decode]
        assert policy.choose(workers, REQUEST).prefill_worker == "old"
        slow = [self.switched("old", 95, kv_tokens=90_000), *workers[1:]]
        assert policy.choose(slow, REQUEST).prefill_worker == "p"
        has_prompts = [self.switched("old", self.MANY, busy_s=0.2), *workers[1:]]
        assert policy.choose(has_prompts, REQUEST).prefill_worker == "p"

    def test_it_is_used_when_it_is_the_only_one(self, policy: PredictivePolicy) -> None:
        workers = [self.switched("old", self.MANY), decode("d")]
        assert policy.choose(workers, REQUEST).prefill_worker == "old"

    def test_a_few_answers_or_a_short_prompt_do_not_matter(self, policy: PredictivePolicy) -> None:
        busy = prefill("p", busy_s=0.25)
        few = [self.switched("old", self.FEW), busy, decode("d")]
        assert policy.choose(few, REQUEST).prefill_worker == "old"
        short = replace(REQUEST, prompt_tokens=50)
        many = [self.switched("old", self.MANY), busy, decode("d")]
        assert policy.choose(many, short).prefill_worker == "old"
        cached = replace(REQUEST, cached_tokens={"old": 950})
        assert policy.choose(many, cached).prefill_worker == "old"

    def test_an_answer_that_is_over_frees_it(self, policy: PredictivePolicy) -> None:
        workers = [self.switched("old", 0), prefill("p", busy_s=0.25), decode("d")]
        assert policy.choose(workers, REQUEST).prefill_worker == "old"
