"""The planner as a whole, look by look: moves where they pay, and holds whenever it cannot know."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.step_times import StepTimes
from core.traffic import TrafficSummary
from core.types import Role, WorkerLoad
from planner.counts import SILENCE_S
from planner.decision import PlanDecision, Verdict
from planner.observation import Observation, ObservedRouter, ObservedWorker
from planner.planner import Planner
from planner.settings import PlannedShape
from tests.unit.planned import Bench, D, P, planner_settings, shape, with_roles, worker, workers

NAN = math.nan
STEADY_RPS = 20.0
"""Of the usual requests, which two prefill and two decode workers serve well."""


def num_prefill(bench: Bench) -> int:
    return sum(each.desired_role is P for each in bench.workers)


def changes(decisions: Sequence[PlanDecision]) -> list[PlanDecision]:
    return [decision for decision in decisions if decision.changes_something]


@pytest.fixture(scope="module")
def settled_once() -> Bench:
    bench = Bench()
    bench.look_on(40, STEADY_RPS)
    assert changes(bench.look_on(5, STEADY_RPS)) == []
    return bench


@pytest.fixture
def settled(settled_once: Bench) -> Bench:
    """A cluster that has what its load needs, and a planner that has seen it for a while."""
    return copy.deepcopy(settled_once)


class TestMoves:
    def test_workers_follow_the_load_within_seconds_and_come_back(self) -> None:
        bench = Bench()
        bench.workers = workers(1, 5)
        bench.look_on(20, 30.0, prompt=6000, output=30)
        many = num_prefill(bench)
        assert many >= 3
        bench.look_on(40, 40.0, prompt=200, output=900)
        assert num_prefill(bench) < many
        bench.look_on(30, 30.0, prompt=6000, output=30)
        assert num_prefill(bench) >= many - 1

    def test_a_steady_load_moves_nothing_once_it_is_served(self) -> None:
        bench = Bench()
        bench.workers = workers(3, 1)
        bench.look_on(30, 30.0)
        assert num_prefill(bench) == 2
        assert changes(bench.look_on(150, 30.0)) == []

    def test_a_decision_says_what_it_goes_by(self) -> None:
        bench = Bench()
        decision = bench.look_on(30, STEADY_RPS)[-1]
        assert decision.verdict is Verdict.HOLD
        assert decision.inputs["rate_rps"] == pytest.approx(STEADY_RPS, rel=0.3)
        assert decision.inputs["output_tokens"] == pytest.approx(300, rel=0.1)
        assert "2P+2D" in [alternative.split for alternative in decision.alternatives]
        assert decision.split == "2P+2D"
        assert decision.number == 30

    def test_what_cannot_be_carried_out_is_decided_anew(self) -> None:
        bench = Bench()
        bench.workers = workers(3, 1)
        moves = changes([bench.look(30.0) for _ in range(40)])  # nobody does as it is told
        assert len(moves) > 5
        assert {change.role for decision in moves[-3:] for change in decision.role_changes} == {D}


class TestBlind:
    """Nothing changes while too little is known."""

    def assert_blind(self, decision: PlanDecision, why: str) -> None:
        assert decision.verdict is Verdict.BLIND
        assert why in decision.reason
        assert not decision.changes_something

    @pytest.mark.parametrize(
        ("unseen", "why"),
        [({"rebuilding": True}, "registry"), ({"workers": ()}, "no worker"), ({"routers": ()}, "no router")],
    )
    def test_what_is_not_seen(self, settled: Bench, unseen: dict[str, Any], why: str) -> None:
        for _ in range(3):
            settled.clock.advance(1.0)
            self.assert_blind(settled.planner.step(settled.observation(**unseen)), why)
        assert changes(settled.look_on(20, STEADY_RPS)) == []

    @pytest.mark.parametrize("age_s", [5.1, 1e9, math.inf, -0.5, -1e9, NAN])
    def test_reports_that_are_old_or_from_the_future(self, settled: Bench, age_s: float) -> None:
        old_workers = tuple(replace(each, age_s=age_s) for each in settled.workers)
        old_routers = tuple(replace(each, age_s=age_s) for each in settled.load.routers)
        settled.clock.advance(1.0)
        seen = settled.observation(workers=old_workers, routers=old_routers)
        self.assert_blind(settled.planner.step(seen), "no worker")
        self.assert_blind(settled.planner.step(settled.observation(routers=old_routers)), "no router")

    def test_too_few_requests(self) -> None:
        bench = Bench()
        self.assert_blind(bench.look_on(20, 0.0)[-1], "too few requests")
        self.assert_blind(bench.look_on(2, 1.0)[-1], "too few requests")

    def test_step_times_that_nobody_knows(self) -> None:
        bench = Bench()
        bench.planner = Planner(bench.settings, StepTimes(), bench.clock)
        self.assert_blind(bench.look_on(20, STEADY_RPS)[-1], "step times")

    def test_workers_of_shapes_it_was_not_told_of(self, settled: Bench) -> None:
        settled.workers = workers(2, 2, shape="stranger")
        self.assert_blind(settled.look(STEADY_RPS), "no worker")

    def test_routers_that_were_away_are_not_taken_for_silence(self, settled: Bench) -> None:
        for _ in range(20):
            settled.clock.advance(1.0)
            settled.load.go_on(1.0, STEADY_RPS)
            settled.planner.step(settled.observation(routers=()))
        decisions = settled.look_on(10, STEADY_RPS)
        assert changes(decisions) == []
        assert decisions[-1].inputs["rate_rps"] == pytest.approx(STEADY_RPS, rel=0.3)


class TestNobodyDecodes:
    def test_somebody_is_made_to_at_once(self) -> None:
        bench = Bench()
        bench.workers = workers(4, 0)
        decision = bench.look()
        assert [change.role for change in decision.role_changes] == [D]
        assert decision.split == "3P+1D"

    def test_also_while_no_router_is_heard_of(self) -> None:
        bench = Bench()
        bench.workers = workers(2, 0)
        assert bench.planner.step(bench.observation(routers=())).role_changes

    def test_not_while_the_registry_may_not_know_who_does(self) -> None:
        bench = Bench()
        bench.workers = workers(2, 0)
        assert not bench.planner.step(bench.observation(rebuilding=True)).changes_something

    def test_a_draining_worker_does_not_count(self) -> None:
        bench = Bench()
        bench.workers = [*workers(2, 0), worker("goes", D, draining=True)]
        (change,) = bench.look().role_changes
        assert change.worker_id != "goes"

    def test_a_worker_that_was_told_already_counts(self) -> None:
        bench = Bench()
        first, second = workers(2, 0)
        bench.workers = [replace(first, desired_role=D), second]
        assert not bench.look().changes_something

    def test_nobody_does_who_may_not(self) -> None:
        bench = Bench(planner_settings(shape(roles=[P])))
        bench.workers = workers(3, 0, allowed=[P])
        assert changes([bench.look(STEADY_RPS) for _ in range(20)]) == []


class TestWorkersComeAndGo:
    def test_draining_workers_are_left_alone(self) -> None:
        bench = Bench()
        going = [worker(f"goes-{number}", D, draining=True) for number in range(2)]
        bench.workers = [*workers(3, 1), *going]
        told = {
            change.worker_id
            for decision in [bench.look(30.0) for _ in range(20)]
            for change in decision.role_changes
        }
        assert told
        assert not any(worker_id.startswith("goes") for worker_id in told)

    def test_new_ids_every_look_are_the_same_workers(self, settled: Bench) -> None:
        for number in range(20):
            settled.workers = [
                worker(f"{number}-{index}", each.desired_role, incarnation=f"{number}-{index}")
                for index, each in enumerate(settled.workers)
            ]
            assert not settled.look(STEADY_RPS).changes_something

    def test_the_split_is_restored_after_workers_were_lost(self) -> None:
        bench = Bench(planner_settings(shape(min_workers=6, max_workers=6)))
        bench.workers = workers(3, 3)
        bench.look_on(30, 30.0)
        before = num_prefill(bench)
        prefills = [each for each in bench.workers if each.desired_role is P]
        bench.workers = [each for each in bench.workers if each not in prefills[:2]]
        bench.look_on(15, 30.0)
        assert num_prefill(bench) >= 2 > before - 2

    def test_a_planner_that_starts_in_the_middle_adopts_what_is_there(self, settled: Bench) -> None:
        before = [each.desired_role for each in settled.workers]
        settled.planner = settled.new_planner()
        assert changes(settled.look_on(40, STEADY_RPS)) == []
        assert [each.desired_role for each in settled.workers] == before


class TestClock:
    @pytest.mark.parametrize("jump_s", [-1e6, -10.0, -0.5, 0.0, 10.0, 29.0, 31.0, 1e6])
    def test_a_jump_moves_nothing(self, settled: Bench, jump_s: float) -> None:
        settled.clock.jump(jump_s)
        decisions = settled.look_on(30, STEADY_RPS)
        assert changes(decisions) == []
        assert decisions[-1].verdict is Verdict.HOLD

    def test_a_clock_that_stands_still_moves_nothing(self, settled: Bench) -> None:
        for _ in range(10):
            settled.load.go_on(1.0, STEADY_RPS)
            assert not settled.planner.step(settled.observation()).changes_something

    def test_a_jump_gives_no_workers_back(self) -> None:
        bench = Bench(planner_settings(shape(min_workers=1, max_workers=8)))
        bench.workers, bench.wanted = workers(2, 2), {"s": 4}
        for jump_s in (1e5, -2e5, 500.0):
            for decision in bench.look_on(20, STEADY_RPS):
                assert decision.counts.get("s", 4) >= 4
            bench.clock.jump(jump_s)
            assert bench.look(STEADY_RPS).counts.get("s", 4) >= 4


ABSURD_LOADS = {
    field + f" {value:g}": WorkerLoad(**{field: value})
    for field in ("num_running", "num_decoding", "num_waiting", "waiting_prefill_tokens")
    for value in (-(10**9), 10**18, 1e300, NAN, math.inf, -math.inf)
}
Distort = Callable[[TrafficSummary], TrafficSummary]


def filled(field: str, value: object) -> Distort:
    """Every count of a summary becomes one value."""

    def distort(traffic: TrafficSummary) -> TrafficSummary:
        old = getattr(traffic, field)
        return replace(traffic, **{field: (value,) * len(old) if isinstance(old, tuple) else value})

    return distort


ABSURD_TRAFFIC: dict[str, Distort] = {
    f"{field} {value}": filled(field, value)
    for field in (
        *("num_arrived", "prompt_tokens", "placed_tokens", "cached_tokens"),
        *("num_reached", "num_ended", "ended_tokens"),
        *("waiting_prompt_tokens", "num_ongoing", "output_tokens", "kv_tokens"),
    )
    for value in (-1, 10**30, NAN, 1e300, None)
} | {
    "classes of another version": lambda traffic: replace(traffic, num_arrived=(1, 2, 3)),
}


class TestAbsurd:
    """What cannot be true neither stops the planner nor moves anything."""

    @pytest.mark.parametrize("load", ABSURD_LOADS.values(), ids=ABSURD_LOADS)
    @pytest.mark.parametrize("index", [0, 3])
    def test_loads(self, settled: Bench, load: WorkerLoad, index: int) -> None:
        honest = settled.workers[index]
        settled.workers[index] = replace(honest, report=replace(honest.report, load=load))
        assert changes(settled.look_on(6, STEADY_RPS)) == []
        settled.workers[index] = honest
        assert changes(settled.look_on(6, STEADY_RPS)) == []

    @pytest.mark.parametrize("distort", ABSURD_TRAFFIC.values(), ids=ABSURD_TRAFFIC)
    def test_counts_of_the_only_router(self, settled: Bench, distort: Distort) -> None:
        for _ in range(4):
            settled.clock.advance(1.0)
            settled.load.go_on(1.0, STEADY_RPS)
            routers = [replace(each, traffic=distort(each.traffic)) for each in settled.load.routers]
            decision = settled.planner.step(settled.observation(routers=tuple(routers)))
            assert not decision.changes_something
        decisions = settled.look_on(10, STEADY_RPS)
        assert changes(decisions) == []
        assert decisions[-1].inputs["rate_rps"] == pytest.approx(STEADY_RPS, rel=0.35)

    def test_counts_that_are_gone_and_come_back(self, settled: Bench) -> None:
        for _ in range(4):
            settled.clock.advance(1.0)
            empty = (ObservedRouter(traffic=TrafficSummary(router_id="r0")),)
            assert not settled.planner.step(settled.observation(routers=empty)).changes_something
        assert changes(settled.look_on(10, STEADY_RPS)) == []

    def test_one_router_that_lies_does_not_hide_the_others(self) -> None:
        bench = Bench(num_routers=4)
        bench.workers = workers(3, 1)
        for _ in range(30):
            bench.clock.advance(1.0)
            bench.load.go_on(1.0, 36.0)
            liar, *others = bench.load.routers
            liar = replace(liar, traffic=filled("num_arrived", NAN)(liar.traffic))
            decision = bench.planner.step(bench.observation(routers=(liar, *others)))
            bench.workers = with_roles(bench.workers, decision)
        assert decision.inputs["rate_rps"] == pytest.approx(27.0, rel=0.35)
        assert num_prefill(bench) == 2

    @pytest.mark.parametrize(
        "size",
        ["max_num_seqs", "max_num_batched_tokens", "num_kv_blocks", "block_size_tokens", "bytes_per_block"],
    )
    @pytest.mark.parametrize("value", [-1, NAN, 0])
    def test_sizes(self, settled: Bench, size: str, value: float) -> None:
        honest = list(settled.workers)
        settled.workers = [
            replace(each, report=replace(each.report, **{size: value}))  # type: ignore[arg-type]
            for each in honest
        ]
        assert changes([settled.look(STEADY_RPS) for _ in range(5)]) == []
        settled.workers = honest
        assert changes(settled.look_on(5, STEADY_RPS)) == []


class TestShapes:
    def test_shapes_of_one_role_keep_it(self) -> None:
        bench = Bench(planner_settings(shape("p", [P]), shape("d", [D])))
        bench.workers = [
            *workers(4, 0, shape="p", allowed=[P]),
            *workers(0, 1, shape="d", allowed=[D]),
        ]
        assert changes(bench.look_on(30, 30.0, prompt=100, output=600)) == []

    def test_only_those_change_that_may(self) -> None:
        bench = Bench(planner_settings(shape("p", [P]), shape("both")))
        bench.workers = [*workers(2, 0, shape="p", allowed=[P]), *workers(3, 1, shape="both")]
        decisions = bench.look_on(40, 30.0, prompt=200, output=600)
        told = [change for decision in decisions for change in decision.role_changes]
        assert told
        assert {change.shape for change in told} == {"both"}
        assert "p 2P" in decisions[-1].split

    def test_local_prefill_may_be_all_there_is(self) -> None:
        bench = Bench()
        bench.workers = workers(0, 1)
        decisions = bench.look_on(30, 2.0, prompt=200)
        assert changes(decisions) == []
        assert decisions[-1].split == "1D"


class Elastic(Bench):
    """Workers come when they are asked for after a while; the youngest go first."""

    def __init__(self, *shapes: PlannedShape, startup_looks: int = 10, **changes: Any) -> None:
        super().__init__(planner_settings(*shapes, **changes))
        self.startup_looks = startup_looks
        self.starting: list[int] = []
        self.num_born = 0
        self.most_wanted = 0

    def live(self, num_looks: int, rate_rps: float, **how: Any) -> None:
        for _ in range(num_looks):
            decision = self.look(rate_rps, **how)
            self.workers = with_roles(self.workers, decision)
            self.wanted |= decision.counts
            self.most_wanted = max(self.most_wanted, self.wanted["s"])
            self.starting = [left - 1 for left in self.starting]
            while self.starting and self.starting[0] <= 0:
                self.starting.pop(0)
                self.num_born += 1
                self.workers.append(worker(f"born-{self.num_born}", D))
            missing = self.wanted["s"] - len(self.workers) - len(self.starting)
            self.starting += [self.startup_looks] * max(missing, 0)
            del self.workers[max(self.wanted["s"], 0) :]
            assert any(each.desired_role is D for each in self.workers)


class TestCounts:
    def test_to_the_ceiling_to_the_floor_and_back(self) -> None:
        bench = Elastic(shape(min_workers=2, max_workers=7, startup_s=10.0), gpu_budget=6.0)
        bench.workers, bench.wanted = workers(1, 1), {"s": 2}
        bench.live(50, 60.0)
        assert (len(bench.workers), bench.most_wanted) == (6, 6)
        assert num_prefill(bench) >= 2  # those that came decode at first
        bench.live(100, 1.0, seconds=3.0)
        assert len(bench.workers) == 2
        assert {each.desired_role for each in bench.workers} == {P, D}
        bench.live(40, 60.0)
        assert len(bench.workers) == 6

    def test_the_last_worker_does_both(self) -> None:
        bench = Elastic(shape(min_workers=1, max_workers=4, startup_s=5.0))
        bench.workers, bench.wanted = workers(1, 1), {"s": 2}
        bench.live(90, 0.5, prompt=100, output=20)
        assert [each.desired_role for each in bench.workers] == [D]

    def test_gpus_that_never_come_hold_nothing_up(self) -> None:
        bench = Elastic(shape(min_workers=2, max_workers=8, startup_s=5.0), startup_looks=10**6)
        bench.workers, bench.wanted = workers(3, 1), {"s": 4}
        bench.live(30, 30.0)
        assert num_prefill(bench) == 2
        bench.live(120, 60.0)
        assert len(bench.workers) == 4

    def test_silence_before_anything_was_heard_takes_its_time(self) -> None:
        bench = Elastic(shape(min_workers=1, max_workers=4, startup_s=5.0))
        bench.workers, bench.wanted = workers(2, 2), {"s": 4}
        bench.live(int(SILENCE_S) - 5, 0.0)
        assert len(bench.workers) == 4
        bench.live(30, 0.0)
        assert len(bench.workers) == 1


# Whatever happens.

SHAPES = (
    shape("both", min_workers=1, max_workers=5, startup_s=5.0),
    shape("p", [P], min_workers=0, max_workers=2, gpus_per_worker=2.0, startup_s=5.0),
    shape("d", [D], min_workers=1, max_workers=1),
)
BUDGET = 7.0
ROLES = {each.name: each.allowed_roles for each in SHAPES}
GPUS = {each.name: each.gpus_per_worker for each in SHAPES}

any_worker = st.builds(
    lambda number, name, role, age_s, draining, load: worker(
        f"{name}-{number}",
        role if role in ROLES[name] else next(iter(ROLES[name])),
        shape=name,
        allowed=ROLES[name],
        age_s=age_s,
        draining=draining,
        load=load,
    ),
    st.integers(0, 4),
    st.sampled_from(sorted(ROLES)),
    st.sampled_from([P, D]),
    st.sampled_from([0.2, 0.2, 0.2, 0.2, 99.0, -1.0, NAN]),
    st.sampled_from([False, False, False, True]),
    st.sampled_from(
        [
            WorkerLoad(),
            WorkerLoad(num_running=200, num_decoding=200),
            WorkerLoad(num_waiting=50),
            *ABSURD_LOADS.values(),
        ]
    ),
)
some_workers = st.lists(any_worker, max_size=8, unique_by=lambda each: each.report.worker_id)
requests = st.sampled_from(
    [(0.0, 100, 10), (2.0, 500, 50), (30.0, 3000, 20), (30.0, 100, 400), (5.0, 60_000, 5), (60.0, 2, 1)]
)


def usable(observation: Observation) -> dict[str, ObservedWorker]:
    """Workers that may be told something."""
    return {
        each.report.worker_id: each
        for each in observation.workers
        if 0.0 <= each.age_s <= 5.0 and not each.report.draining
    }


def check(observation: Observation, decision: PlanDecision, wanted: dict[str, int]) -> None:
    present = usable(observation)
    told = {change.worker_id: change.role for change in decision.role_changes}
    assert len(told) == len(decision.role_changes)
    assert told.keys() <= present.keys()
    for worker_id, role in told.items():
        assert role in ROLES[present[worker_id].report.shape]
        assert role is not present[worker_id].desired_role
    before = [each.desired_role for each in present.values()]
    after = [told.get(worker_id, each.desired_role) for worker_id, each in present.items()]
    able = any(D in ROLES[each.report.shape] for each in present.values())
    assert D in after or D not in before
    assert D in after or not able or observation.rebuilding
    assert sum(num * GPUS[name] for name, num in wanted.items()) <= BUDGET
    for each in SHAPES:
        assert each.min_workers <= wanted[each.name] <= each.max_workers
    assert observation.rebuilding is False or not decision.changes_something


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_happens_roles_and_counts_stay_in_bounds(data: st.DataObject) -> None:
    bench = Bench(planner_settings(*SHAPES, gpu_budget=BUDGET, num_spares=data.draw(st.integers(0, 1))))
    bench.workers = data.draw(some_workers)
    bench.wanted = {"both": 3, "p": 1, "d": 1}
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["load", "load", "load", "workers", "clock", "routers", "planner"]))
        if what == "workers":
            bench.workers = data.draw(some_workers)
        if what == "clock":
            bench.clock.jump(data.draw(st.sampled_from([-1e5, -3.0, 40.0, 1e5])))
        if what == "planner":
            bench.planner = bench.new_planner()
        distort = data.draw(st.sampled_from(list(ABSURD_TRAFFIC.values()))) if what == "routers" else None
        rebuilding = what == "routers" and data.draw(st.booleans())
        rate_rps, prompt, output = data.draw(requests)
        for _ in range(data.draw(st.sampled_from([1, 4]))):
            bench.clock.advance(data.draw(st.sampled_from([0.0, 1.0, 5.0])))
            bench.load.go_on(1.0, rate_rps, prompt=prompt, output=output)
            routers: list[ObservedRouter] = bench.load.routers
            if distort is not None:
                routers = [replace(each, traffic=distort(each.traffic)) for each in routers]
            seen = bench.observation(routers=tuple(routers), rebuilding=rebuilding)
            decision = bench.planner.step(seen)
            bench.wanted |= decision.counts
            check(seen, decision, bench.wanted)
            bench.workers = with_roles(bench.workers, decision)


def test_a_look_at_64_workers_takes_little_time() -> None:
    bench = Bench(planner_settings(shape(min_workers=64, max_workers=64)), num_routers=4)
    bench.workers = workers(32, 32)
    for decision in bench.look_on(12, 200.0, output=20):
        assert decision.number
    assert decision.verdict is not Verdict.BLIND
    assert Role.DECODE in {each.desired_role for each in bench.workers}
