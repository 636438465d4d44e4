"""How many workers: floors, ceilings, budgets, spares, and GPUs that do not come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.demand import Demand
from planner.prediction import QueueingPredictor, Targets
from planner.rate_forecast import RateForecast
from planner.settings import PlannedShape
from planner.sizing import GIVEN_UP_S, LATE_FACTOR, LATE_S, Sizer, Sizing
from tests.unit.planned import D, P, demand, kind, planner_settings, shape

STARTUP_S = 40.0
FREE = shape(min_workers=2, max_workers=16, startup_s=STARTUP_S)
QUIET, BUSY = demand(2.0), demand(60.0)


class Counts:
    """A sizer whose wishes come true at once, and the time."""

    def __init__(self, *shapes: PlannedShape, now: Mapping[str, int] | None = None, **changes: Any) -> None:
        self.settings = planner_settings(*(shapes or (FREE,)), **changes)
        predict = QueueingPredictor(Targets(ttft_s=0.5, tpot_s=0.02))
        self.sizer = Sizer(self.settings, predict)
        self.kinds = {each.name: kind() for each in self.settings.shapes}
        self.wanted = dict(now or {each.name: each.min_workers for each in self.settings.shapes})
        self.present: dict[str, int] | None = None
        """None: all that are wanted."""
        self.now_s = 0.0

    def look(self, load: Demand | None, ahead: RateForecast | None = None) -> Sizing | None:
        self.now_s += 1.0
        present = dict(self.wanted if self.present is None else self.present)
        found = self.sizer.size(self.now_s, self.kinds, dict(self.wanted), present, load, ahead)
        if found is not None:
            self.wanted |= found.counts
        return found

    def after(self, seconds: int, load: Demand | None, ahead: RateForecast | None = None) -> dict[str, int]:
        """What is wanted after a while."""
        for _ in range(seconds):
            self.look(load, ahead)
        return dict(self.wanted)

    @property
    def num_gpus(self) -> float:
        return sum(self.wanted[each.name] * each.gpus_per_worker for each in self.settings.shapes)


class TestLoad:
    def test_more_are_asked_for_at_once(self) -> None:
        counts = Counts()
        found = counts.look(BUSY)
        assert found is not None
        assert counts.wanted["s"] > 4
        assert "requests/s" in found.reason
        assert counts.look(BUSY) is None

    def test_no_more_than_are_needed_and_no_fewer(self) -> None:
        sizes = [Counts().after(1, demand(rate))["s"] for rate in (0.1, 2.0, 20.0, 40.0, 60.0, 500.0)]
        assert sizes == sorted(sizes)
        assert sizes[0] == 2
        assert sizes[2] < sizes[4]

    def test_fewer_only_when_fewer_have_been_enough_for_the_hold_time(self) -> None:
        counts = Counts()
        busy = counts.after(60, BUSY)["s"]
        assert counts.after(int(STARTUP_S) - 2, QUIET)["s"] == busy
        assert counts.after(4, QUIET)["s"] < busy

    def test_a_short_swing_takes_nothing_away(self) -> None:
        counts = Counts()
        busy = counts.after(60, BUSY)["s"]
        for _ in range(5):
            counts.after(int(STARTUP_S) - 5, QUIET)
            assert counts.after(5, BUSY)["s"] == busy

    def test_the_hold_time_can_be_set(self) -> None:
        counts = Counts(hold_s=5.0)
        busy = counts.after(20, BUSY)["s"]
        assert counts.after(7, QUIET)["s"] < busy

    def test_silence_goes_to_the_floor_and_load_comes_back_up(self) -> None:
        counts = Counts(now={"s": 9})
        assert counts.after(int(STARTUP_S) + 3, None) == {"s": 2}
        assert counts.after(1, BUSY)["s"] > 4

    def test_it_rises_before_the_load_does(self) -> None:
        counts = Counts()
        counts.after(60, QUIET)
        ahead = RateForecast(mean_rps=60.0, high_rps=66.0)
        assert counts.after(1, QUIET, ahead)["s"] >= Counts().after(1, BUSY)["s"]

    def test_a_forecast_of_less_takes_nothing_from_the_load_of_now(self) -> None:
        ahead = RateForecast(mean_rps=0.0, high_rps=0.5)
        assert Counts().after(1, BUSY, ahead) == Counts().after(1, BUSY)

    def test_a_gap_in_the_looks_is_no_reason_to_give_back(self) -> None:
        counts = Counts()
        busy = counts.after(60, BUSY)["s"]
        counts.now_s += 3600.0
        assert counts.after(3, QUIET)["s"] == busy

    @pytest.mark.parametrize("jump_s", [-1e6, -20.0, 50.0, 1e6])
    def test_a_clock_that_jumps_gives_nothing_back_too_soon(self, jump_s: float) -> None:
        counts = Counts()
        busy = counts.after(60, BUSY)["s"]
        counts.now_s += jump_s
        assert counts.after(int(STARTUP_S) - 2, QUIET)["s"] == busy
        assert counts.after(5, QUIET)["s"] < busy


class TestBounds:
    def test_the_floor_and_the_ceiling_hold(self) -> None:
        assert Counts().after(1, demand(1e6))["s"] <= 16
        assert Counts(now={"s": 16}).after(200, demand(0.01))["s"] == 2

    def test_counts_outside_of_the_bounds_come_back_at_once(self) -> None:
        assert Counts(now={"s": 30}).after(1, BUSY)["s"] <= 16
        assert Counts(now={"s": 0}).after(1, QUIET)["s"] >= 2

    def test_the_budget_holds(self) -> None:
        assert Counts(gpu_budget=5.0).after(5, demand(1e3))["s"] == 5

    def test_a_budget_that_got_smaller_is_kept_to_at_once(self) -> None:
        a, b = (shape(name, min_workers=1, max_workers=8) for name in "ab")
        counts = Counts(a, b, now={"a": 6, "b": 6}, gpu_budget=4.0)
        counts.look(BUSY)
        assert counts.num_gpus <= 4.0

    def test_big_workers_are_counted_by_their_gpus(self) -> None:
        small = shape("small", min_workers=1, max_workers=8)
        big = shape("big", min_workers=0, max_workers=4, gpus_per_worker=4.0)
        counts = Counts(small, big, gpu_budget=8.0)
        for _ in range(5):
            counts.look(demand(300.0))
            assert counts.num_gpus <= 8.0

    def test_shapes_whose_count_is_fixed_stay(self) -> None:
        fixed = shape("p", [P], min_workers=3, max_workers=3)
        free = shape("d", [D], min_workers=1, max_workers=8)
        wanted = Counts(fixed, free).after(3, BUSY)
        assert wanted["p"] == 3
        assert wanted["d"] > 1

    def test_without_a_free_count_there_is_nothing_to_do(self) -> None:
        sizer = Counts(shape()).sizer
        assert sizer.startup_s == 0.0
        assert Counts().sizer.startup_s == STARTUP_S

    def test_a_shape_nobody_knows_the_speed_of_stays_as_it_is(self) -> None:
        a, b = (shape(name, min_workers=1, max_workers=8) for name in "ab")
        counts = Counts(a, b)
        del counts.kinds["b"]
        wanted = counts.after(3, BUSY)
        assert wanted["b"] == 1
        assert wanted["a"] > 1


class TestSpares:
    def test_a_warm_spare_is_one_more(self) -> None:
        without, one = (Counts(num_spares=num).after(1, demand(20.0))["s"] for num in (0, 1))
        assert one == without + 1

    def test_spares_fit_into_the_ceiling_and_the_budget(self) -> None:
        assert Counts(num_spares=3).after(1, demand(1e4))["s"] <= 16
        assert Counts(num_spares=9, gpu_budget=6.0).after(1, QUIET)["s"] <= 6

    def test_silence_keeps_the_spares(self) -> None:
        assert Counts(num_spares=1).after(int(STARTUP_S) + 5, None)["s"] == 3

    def test_the_smallest_shape_has_them(self) -> None:
        small = shape("small", min_workers=1, max_workers=8)
        big = shape("big", min_workers=1, max_workers=8, gpus_per_worker=8.0)
        assert Counts(big, small, num_spares=1).after(1, None) == {"small": 2, "big": 1}


class TestNobodyComes:
    LATE_AFTER_S = int(LATE_FACTOR * STARTUP_S + LATE_S)

    def test_workers_that_do_not_come_are_no_longer_counted_on_after_a_while(self) -> None:
        counts = Counts()
        counts.look(BUSY)
        asked = counts.wanted["s"]
        counts.present = {"s": 3}
        assert counts.after(self.LATE_AFTER_S - 2, BUSY)["s"] == asked
        assert counts.after(5, BUSY)["s"] == 3

    def test_after_a_while_they_are_asked_for_again(self) -> None:
        counts = Counts()
        counts.look(BUSY)
        counts.present = {"s": 3}
        counts.after(self.LATE_AFTER_S + 5, BUSY)
        assert counts.after(int(GIVEN_UP_S) - 20, BUSY)["s"] == 3
        assert counts.after(30, BUSY)["s"] > 3

    def test_another_shape_takes_their_place(self) -> None:
        a, b = (shape(name, min_workers=1, max_workers=8, startup_s=STARTUP_S) for name in "ab")
        counts = Counts(a, b)
        counts.look(BUSY)
        grown = max(counts.wanted, key=lambda name: counts.wanted[name])
        other = "b" if grown == "a" else "a"
        counts.present = {grown: 1, other: 1}
        for _ in range(self.LATE_AFTER_S + 20):
            counts.look(BUSY)
            counts.present[other] = counts.wanted[other]
        assert counts.wanted[grown] == 1
        assert counts.wanted[other] > 1

    def test_workers_that_come_one_by_one_are_waited_for(self) -> None:
        counts = Counts()
        counts.look(BUSY)
        asked = counts.wanted["s"]
        for num in range(2, asked):
            counts.present = {"s": num}
            assert counts.after(int(STARTUP_S) + 20, BUSY)["s"] == asked

    def test_the_floor_is_never_given_up(self) -> None:
        counts = Counts()
        counts.present = {"s": 0}
        assert counts.after(2 * self.LATE_AFTER_S, QUIET)["s"] == 2


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_bounds_and_budget_hold_whatever_happens(data: st.DataObject) -> None:
    """Each ask is carried out by itself, in any order, and some workers never come."""
    shapes = []
    for name in data.draw(st.sampled_from(["a", "ab", "abc"])):
        least = data.draw(st.integers(0 if shapes else 1, 3))
        most = least + data.draw(st.integers(0, 4))
        gpus = data.draw(st.sampled_from([0.5, 1.0, 4.0]))
        shapes.append(shape(name, min_workers=least, max_workers=most, gpus_per_worker=gpus, startup_s=5.0))
    floor = sum(each.min_workers * each.gpus_per_worker for each in shapes)
    budget = floor + data.draw(st.floats(0.0, 8.0))
    counts = Counts(*shapes, gpu_budget=budget, num_spares=data.draw(st.integers(0, 2)))
    gpus_of = {each.name: each.gpus_per_worker for each in shapes}
    bounds = {each.name: (each.min_workers, each.max_workers) for each in shapes}
    for _ in range(data.draw(st.integers(1, 15))):
        counts.now_s += data.draw(st.sampled_from([0.0, 1.0, 10.0, 100.0, -50.0]))
        counts.present = {name: data.draw(st.integers(0, num)) for name, num in counts.wanted.items()}
        load = data.draw(st.sampled_from([None, QUIET, BUSY, demand(5.0, 20_000.0), demand(1e9)]))
        ahead = data.draw(st.sampled_from([None, RateForecast(mean_rps=50.0, high_rps=70.0)]))
        before = dict(counts.wanted)
        found = counts.look(load, ahead)
        for name in data.draw(st.permutations(sorted(found.counts if found else ()))):
            assert found is not None
            before[name] = found.counts[name]
            assert sum(num * gpus_of[each] for each, num in before.items()) <= budget + 1e-9
        for name, num in counts.wanted.items():
            assert bounds[name][0] <= num <= bounds[name][1]


def test_a_worker_in_the_wings_counts_as_wanted() -> None:
    counts = Counts()
    counts.look(BUSY)
    counts.present = {"s": 2}
    before = dict(counts.wanted)
    counts.after(20, BUSY)
    assert counts.wanted == before


def test_prompts_only_and_answers_only_ask_for_workers_too() -> None:
    long_prompts, long_answers = demand(60.0, 6000.0, 20.0), demand(30.0, 100.0, 1500.0)
    assert Counts().after(1, long_prompts)["s"] > 2
    assert Counts().after(1, long_answers)["s"] > 2


def test_workers_that_leave_hold_their_gpus_until_they_are_gone() -> None:
    counts = Counts(shape(min_workers=1, max_workers=8), gpu_budget=4.0)
    sizer, name = counts.sizer, counts.settings.shapes[0].name
    busy = (1.0, counts.kinds, {name: 2}, {name: 2}, BUSY, None, 0.0)
    all_four = sizer.size(*busy)
    assert all_four is not None
    assert all_four.counts == {name: 4}
    assert sizer.size(*busy, leaving={name: 2}) is None
    one = sizer.size(*busy, leaving={name: 1})
    assert one is not None
    assert one.counts == {name: 3}
