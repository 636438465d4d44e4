"""Admission control: what is sent, what waits, what is refused and when."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import ManualClock
from core.errors import ConfigError, NoWorkerAvailable, Rejected
from core.performance_model import LinearStepTime
from core.types import Role
from router.admission import AdmissionController
from router.admission_limits import AdmissionLimits
from router.placement import Placement, judge
from router.prediction_margin import PredictionMargin
from router.prefill_queue import PrefillQueue
from router.routing import Candidate, Decision, RoutingRequest

DECISION = Decision(decode_worker="d", prefill_worker="p", reason="test")
STEP = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.1,
    prefill_base_ms=10.0,
    decode_base_ms=5.0,
    decode_ms_per_seq=1.0,
    decode_ms_per_kv_token=0.0,
)


@dataclass
class Cluster:
    """One worker that computes one prompt at a time."""

    clock: ManualClock = field(default_factory=ManualClock)
    busy_until_s: float = 0.0
    gone: bool = False
    placing_takes_s: float = 0.0
    sent: list[str] = field(default_factory=list)
    refused: dict[str, Exception] = field(default_factory=dict)


class Request:
    def __init__(
        self,
        cluster: Cluster,
        request_id: str,
        *,
        tenant: str = "",
        priority: int = 0,
        ttft_slo_s: float = math.inf,
        work_s: float = 1.0,
    ) -> None:
        self.cluster = cluster
        self.request_id = request_id
        self.tenant = tenant
        self.priority = priority
        self.arrival_s = cluster.clock.now_s()
        self.ttft_slo_s = ttft_slo_s
        self.prompt_tokens = 100
        self.work_s = work_s

    def place(self, now_s: float) -> Placement:
        if self.cluster.gone:
            raise NoWorkerAvailable("gone")
        self.cluster.clock.advance(self.cluster.placing_takes_s)
        starts_in_s = max(0.0, self.cluster.busy_until_s - now_s)
        return Placement(
            decision=DECISION,
            has_room=not starts_in_s,
            room_in_s=starts_in_s,
            ttft_s=now_s - self.arrival_s + starts_in_s + self.work_s,
            work_s=self.work_s,
        )

    def send(self, placement: Placement) -> None:
        assert placement.has_room
        self.cluster.busy_until_s = self.cluster.clock.now_s() + self.work_s
        self.cluster.sent.append(self.request_id)

    def refuse(self, error: Exception) -> None:
        self.cluster.refused[self.request_id] = error


class Router:
    def __init__(self, **limits: float) -> None:
        self.cluster = Cluster()
        self.controller = AdmissionController(
            AdmissionLimits(**limits),  # type: ignore[arg-type]
            self.cluster.clock,
        )

    def offer(self, request_id: str, **more: object) -> Request:
        request = Request(self.cluster, request_id, **more)  # type: ignore[arg-type]
        if (placement := self.controller.offer(request)) is not None:
            request.send(placement)
        return request

    def run(self, seconds: float) -> None:
        """Time passes; the controller is called when it asked to be, and only then."""
        clock = self.cluster.clock
        end_s = clock.now_s() + seconds
        while (next_s := self.controller.next_update_s()) <= end_s:
            assert next_s >= clock.now_s() - 1e-9
            clock.advance(max(0.0, next_s - clock.now_s()))
            self.controller.update()
        clock.advance(end_s - clock.now_s())


def test_with_room_and_nobody_waiting_a_request_goes_at_once() -> None:
    router = Router()
    router.offer("a")
    assert router.cluster.sent == ["a"]
    assert router.controller.num_waiting == 0
    assert router.controller.next_update_s() == math.inf


def test_without_room_it_waits_until_there_is() -> None:
    router = Router()
    router.offer("a")
    router.offer("b")
    assert router.controller.num_waiting == 1
    router.run(0.9)
    assert router.cluster.sent == ["a"]
    router.run(0.2)
    assert router.cluster.sent == ["a", "b"]


def test_room_that_comes_while_the_line_is_tried_is_for_those_in_front() -> None:
    router = Router()
    router.offer("running")
    for name in ("first", "second", "third"):
        router.offer(name)
    router.run(0.9995)
    router.cluster.placing_takes_s = 0.0004
    router.controller.update()
    assert router.cluster.sent == ["running"]
    router.controller.update()
    assert router.cluster.sent == ["running", "first"]


def test_news_of_room_is_used_before_the_time_that_was_predicted() -> None:
    router = Router()
    router.offer("a")
    router.offer("b")
    router.run(0.1)
    router.cluster.busy_until_s = 0.0
    router.controller.update()
    assert router.cluster.sent == ["a", "b"]


def test_what_would_be_too_late_is_refused_on_arrival() -> None:
    router = Router()
    router.offer("a")
    with pytest.raises(Rejected) as refused:
        router.offer("b", ttft_slo_s=1.5)
    assert (refused.value.reason, refused.value.status, refused.value.retry_after_s) == ("too_late", 429, 1)
    assert router.controller.num_waiting == 0


def test_retry_after_says_when_the_line_will_be_short_enough() -> None:
    router = Router(aging_s=1000.0)
    for number in range(10):
        router.offer(f"a{number}")
    router.run(4.5)
    with pytest.raises(Rejected) as refused:
        router.offer("late", ttft_slo_s=1.2, work_s=1.0)
    assert refused.value.retry_after_s == 1  # its deadline puts it in front of the patient ones
    for number in range(5):
        router.offer(f"b{number}", ttft_slo_s=20.0)
    with pytest.raises(Rejected) as refused:
        router.offer("later", ttft_slo_s=20.0, priority=1, work_s=19.0)
    assert 5 <= refused.value.retry_after_s <= 15


def test_the_wait_behind_those_in_front_counts() -> None:
    router = Router()
    for number in range(8):
        router.offer(f"a{number}", ttft_slo_s=60.0)
    router.run(3.5)
    router.offer("fits", ttft_slo_s=60.0)
    with pytest.raises(Rejected):
        router.offer("does not", ttft_slo_s=3.0, priority=1)
    router.offer("urgent", ttft_slo_s=3.0, priority=-1)
    router.run(1.0)
    assert router.cluster.sent[-1] == "urgent"


def test_one_that_became_too_late_in_line_is_refused_before_any_work() -> None:
    router = Router()
    router.offer("a")
    router.offer("b", ttft_slo_s=2.5)
    router.cluster.busy_until_s = 5.0  # the worker is slower than it was thought to be
    router.run(2.0)
    error = router.cluster.refused["b"]
    assert isinstance(error, Rejected)
    assert (error.reason, error.status) == ("too_late", 503)
    assert router.cluster.sent == ["a"]


def test_without_early_rejection_it_waits_as_long_as_the_limit_says() -> None:
    router = Router(early_rejection=False, max_wait_s=3.0)
    router.cluster.busy_until_s = 100.0
    router.offer("a", ttft_slo_s=0.1)
    router.run(2.9)
    assert router.controller.num_waiting == 1
    router.run(0.2)
    error = router.cluster.refused["a"]
    assert isinstance(error, Rejected)
    assert error.reason == "waited_too_long"


def test_what_misses_its_target_on_an_idle_cluster_is_served_all_the_same() -> None:
    router = Router()
    router.offer("long", ttft_slo_s=0.5, work_s=4.0)
    router.offer("long too", ttft_slo_s=0.5, work_s=4.5)
    router.run(4.1)
    assert router.cluster.sent == ["long", "long too"]


def test_whatever_was_learned_an_idle_cluster_is_given_work() -> None:
    router = Router()
    for _ in range(200):
        router.controller.lateness.answered(0.1, 5.0)
    router.offer("a", ttft_slo_s=0.5, work_s=0.2)
    assert router.cluster.sent == ["a"]


def test_answers_let_in_long_ago_teach_no_more_care_than_they_needed() -> None:
    router = Router()
    for _ in range(500):
        router.controller.lateness.finished(0.033, 0.030, 50)
    assert router.controller.lateness.tpot_factor() == pytest.approx(1.1, abs=0.06)


def test_a_full_line_refuses_but_for_the_more_urgent() -> None:
    router = Router(max_queue_requests=2)
    for name in "abc":
        router.offer(name)
    with pytest.raises(Rejected) as refused:
        router.offer("d")
    assert (refused.value.reason, refused.value.status) == ("queue_full", 429)
    router.offer("e", priority=-1)
    error = router.cluster.refused["c"]
    assert isinstance(error, Rejected)
    assert error.reason == "displaced"
    router.run(3.0)
    assert router.cluster.sent == ["a", "e", "b"]


def test_one_that_waits_for_its_worker_does_not_block_the_others() -> None:
    router = Router()
    router.offer("a")
    stuck = router.offer("stuck")
    idle = Cluster(clock=router.cluster.clock)
    elsewhere = Request(idle, "elsewhere")
    placement = router.controller.offer(elsewhere)
    assert placement is not None
    assert stuck.request_id not in router.cluster.sent


def test_a_client_that_goes_leaves_the_line() -> None:
    router = Router()
    router.offer("a")
    router.offer("b")
    router.controller.withdraw("b")
    router.controller.withdraw("b")
    router.controller.withdraw("never heard of")
    router.run(10.0)
    assert router.cluster.sent == ["a"]
    assert not router.cluster.refused
    assert router.controller.next_update_s() == math.inf


def test_those_that_wait_are_told_when_nobody_serves_them_any_more() -> None:
    router = Router()
    router.offer("a")
    router.offer("b")
    router.cluster.gone = True
    router.run(1.1)
    assert isinstance(router.cluster.refused["b"], NoWorkerAvailable)
    with pytest.raises(NoWorkerAvailable):
        router.offer("c")


def test_a_low_priority_waits_no_longer_than_the_bound() -> None:
    """Urgent ones come faster than the worker computes; ageing lets the old one through all the same."""
    router = Router(aging_s=4.0, early_rejection=False, max_wait_s=1000.0)
    router.offer("first")
    old = router.offer("old", priority=2)
    for number in range(200):
        router.offer(f"u{number}", priority=0)
        router.run(0.5)
        if "old" in router.cluster.sent:
            break
    # (2 - 0 + 1) * 4 s, in which 24 urgent ones came, which take 24 s.
    assert router.cluster.clock.now_s() - old.arrival_s <= 3 * 4.0 + 24.0 + 1.0
    assert router.cluster.sent.index("old") <= 26


@given(
    st.lists(
        st.tuples(
            st.floats(0, 2),
            st.sampled_from("ab"),
            st.integers(-20, 20),
            st.sampled_from([0.3, 2.0, 10.0, math.inf]),
            st.floats(0.05, 2.0),
            st.booleans(),
        ),
        max_size=30,
    ),
    st.integers(0, 5),
)
def test_every_request_ends_once(
    arrivals: list[tuple[float, str, int, float, float, bool]], max_queue: int
) -> None:
    router = Router(max_queue_requests=max_queue, max_wait_s=20.0)
    turned_away: list[str] = []
    withdrawn: list[str] = []
    for number, (gap_s, tenant, priority, slo_s, work_s, leaves) in enumerate(arrivals):
        router.run(gap_s)
        name = str(number)
        try:
            router.offer(name, tenant=tenant, priority=priority, ttft_slo_s=slo_s, work_s=work_s)
        except Rejected:
            turned_away.append(name)
            continue
        assert router.controller.num_waiting <= max_queue
        if leaves and name not in router.cluster.sent:
            router.controller.withdraw(name)
            withdrawn.append(name)
    router.run(100.0)
    ended = [*turned_away, *withdrawn, *router.cluster.sent, *router.cluster.refused]
    assert sorted(ended, key=int) == [str(number) for number in range(len(arrivals))]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dispatch_ahead_s", 0.0),
        ("aging_s", -1.0),
        ("tpot_share", 1.5),
        ("max_queue_requests", -1),
        ("reject_above", math.inf),
        ("tenant_weights", {"a": 0.0}),
    ],
)
def test_limits_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        AdmissionLimits(**{name: value})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ room

PREFILL = Candidate(
    worker_id="p",
    role=Role.PREFILL,
    num_requests=1,
    waiting_prefill_tokens=100,
    kv_used_tokens=0,
    kv_capacity_tokens=10_000,
    max_num_seqs=16,
    max_num_batched_tokens=512,
    step_time=STEP,
)
DECODE = replace(PREFILL, worker_id="d", role=Role.DECODE, waiting_prefill_tokens=0)
ASK = RoutingRequest(prompt_tokens=400, now_s=10.0, waited_s=0.3, tpot_slo_s=0.02)


def place(prefill: Candidate = PREFILL, decode: Candidate = DECODE, ask: RoutingRequest = ASK) -> Placement:
    return judge(DECISION, {"p": prefill, "d": decode}, ask, AdmissionLimits(), tpot_slo_s=0.02)


def test_there_is_room_while_the_prompt_starts_soon() -> None:
    soon = place(replace(PREFILL, own_prefills=1, prefill_free_at_s=10.1))
    assert soon.has_room
    assert soon.work_s == pytest.approx(0.05)
    assert soon.ttft_s == pytest.approx(0.3 + 0.1 + 0.05)
    later = place(replace(PREFILL, own_prefills=1, prefill_free_at_s=11.0))
    assert not later.has_room
    assert later.room_in_s == pytest.approx(0.9)
    assert place(replace(PREFILL, prefill_free_at_s=11.0)).has_room  # all of it other routers'


def test_there_is_room_while_the_batch_keeps_the_tpot() -> None:
    assert place(decode=replace(DECODE, num_requests=13)).has_room  # 5 + 14 ms
    assert not place(decode=replace(DECODE, num_requests=14)).has_room  # 20 ms, and 95% of them are kept
    tighter = judge(
        DECISION,
        {"p": PREFILL, "d": replace(DECODE, num_requests=9)},
        ASK,
        AdmissionLimits(),
        tpot_slo_s=0.01,
    )
    assert not tighter.has_room


def test_a_tpot_out_of_reach_is_served_in_a_short_batch() -> None:
    ask = replace(ASK, tpot_slo_s=0.001)
    assert place(decode=replace(DECODE, num_requests=0), ask=ask).has_room
    assert place(decode=replace(DECODE, num_requests=3), ask=ask).has_room  # 9 ms, alone 6
    assert not place(decode=replace(DECODE, num_requests=5), ask=ask).has_room


def test_there_is_room_while_the_kv_fits() -> None:
    assert place(decode=replace(DECODE, kv_used_tokens=9_000)).has_room
    assert not place(decode=replace(DECODE, kv_used_tokens=9_200)).has_room
    assert place(decode=replace(DECODE, num_requests=0, kv_used_tokens=9_900)).has_room


def test_without_step_times_tokens_and_requests_tell() -> None:
    plain = replace(PREFILL, step_time=None)
    decode = replace(DECODE, step_time=None)
    assert place(replace(plain, waiting_prefill_tokens=1023), decode).has_room
    assert not place(replace(plain, waiting_prefill_tokens=1024), decode).has_room
    assert not place(replace(plain, num_requests=16), decode).has_room
    assert not place(plain, replace(decode, num_requests=16)).has_room
    assert place(plain, decode).ttft_s is None


# --------------------------------------------------------------------------------- what is learned


def test_a_margin_settles_where_the_share_is_kept() -> None:
    margin = PredictionMargin(0.0, step=0.01, highest=1.0, share=0.9)
    errors_s = [((7919 * number) % 1000) / 1000 * 0.5 for number in range(5000)]
    too_low = []
    for number, error_s in enumerate(errors_s):
        now_s = number / 1000
        missed = error_s > margin.at(now_s)
        margin.observe(now_s, too_low=missed)
        too_low.append(missed)
    assert sum(too_low[1000:]) / 4000 == pytest.approx(0.1, abs=0.03)


def test_a_margin_fades_without_news() -> None:
    margin = PredictionMargin(0.0, step=0.1, highest=0.5, share=0.9)
    for _ in range(10):
        margin.observe(0.0, too_low=True)
    assert margin.at(0.0) == 0.5
    assert margin.at(120.0) < 0.01


def test_a_queue_of_ones_own_is_what_was_sent() -> None:
    queue = PrefillQueue(0.0)
    queue.sent(0.0, 0.3)
    queue.sent(0.1, 0.2)
    assert queue.free_at_s(0.2) == pytest.approx(0.5)
    queue.ended(0.35, 0.3, none_left=False)
    assert queue.free_at_s(0.35) == pytest.approx(0.55)
    assert not queue.shared


def test_what_others_send_between_two_words_is_learned() -> None:
    """Three others keep a worker's queue at 0.6 s; words come every 0.5 s."""
    queue = PrefillQueue(0.0)
    for number in range(1, 21):
        queue.heard(number * 0.5, 0.6)
    assert queue.shared
    assert queue.free_at_s(10.4) - 10.4 == pytest.approx(0.58, abs=0.03)
    queue.heard(10.5, 0.0)
    for number in range(22, 40):
        queue.heard(number * 0.5, 0.0)
    assert queue.free_at_s(20.0) <= 20.01
