"""When a better split is worth a move."""

from __future__ import annotations

import math

import pytest

from core.types import WorkerLoad
from planner.candidates import role_splits
from planner.prediction import Prediction
from planner.roles import ENOUGH_REGRET, Choice, RoleChooser
from planner.split import PlannedSplit, ShapeSplit
from tests.unit.planned import P, shape, workers

RATE_RPS = 50.0


class Looks:
    """A chooser, and four workers whose splits do as they are told."""

    def __init__(self, num_prefill: int = 2, rate_rps: float = RATE_RPS) -> None:
        self.chooser = RoleChooser()
        self.workers = workers(num_prefill, 4 - num_prefill)
        self.rate_rps = rate_rps
        present = PlannedSplit((ShapeSplit("s", num_prefill, 4 - num_prefill),))
        self.splits = role_splits([shape()], present)

    def __call__(self, attained: dict[int, float], later: dict[int, float] | None = None) -> Choice:
        """One look; what is attained by the number of prefill workers, 0 where it is not said.

        Args:
            later: in the long run; None: the same.
        """
        soon, in_the_end = (
            [
                Prediction(attainment=by_num.get(split.num_prefill, 0.0), prefill_use=0.5, decode_use=0.5)
                for split in self.splits
            ]
            for by_num in (attained, attained if later is None else later)
        )
        return self.chooser.choose(self.workers, self.splits, soon, in_the_end, self.rate_rps)


def moved(choice: Choice) -> int | None:
    """Prefill workers after the move; None without one."""
    return None if choice.chosen is choice.present else choice.chosen.split.num_prefill


def test_what_is_clearly_better_is_done_at_once() -> None:
    choice = Looks()({2: 0.4, 3: 0.95})
    assert moved(choice) == 3
    assert [change.role for change in choice.chosen.moves.changes] == [P]
    assert "3P+1D" in choice.reason


def test_several_workers_change_at_once() -> None:
    choice = Looks(num_prefill=0)({0: 0.1, 1: 0.3, 2: 0.6, 3: 0.99})
    assert moved(choice) == 3
    assert len(choice.chosen.moves.changes) == 3


def test_of_splits_that_gain_about_as_much_the_nearest_is_taken() -> None:
    assert moved(Looks(num_prefill=0)({0: 0.1, 1: 0.3, 2: 0.95, 3: 0.99})) == 2
    assert moved(Looks(num_prefill=0)({0: 0.1, 1: 0.3, 2: 0.85, 3: 0.99})) == 3


def test_what_is_somewhat_better_is_done_when_the_next_look_agrees() -> None:
    looks = Looks()
    somewhat = {2: 0.85, 3: 0.93}
    assert moved(looks(somewhat)) is None
    assert moved(looks(somewhat)) == 3


def test_two_looks_that_contradict_each_other_move_nothing() -> None:
    looks = Looks()
    for _ in range(5):
        assert moved(looks({2: 0.85, 3: 0.93})) is None
        assert moved(looks({2: 0.85, 1: 0.93})) is None


def test_a_look_in_between_that_is_content_is_a_new_beginning() -> None:
    looks = Looks()
    looks({2: 0.85, 3: 0.93})
    looks({2: 0.99, 3: 0.9})
    assert moved(looks({2: 0.85, 3: 0.93})) is None
    looks({2: 0.85, 3: 0.93})
    looks.chooser.forget()
    assert moved(looks({2: 0.85, 3: 0.93})) is None


def test_what_is_hardly_better_is_never_done() -> None:
    looks = Looks()
    for _ in range(100):
        assert moved(looks({2: 0.900, 3: 0.903})) is None


def looks_until_moved(looks: Looks, gain: float) -> int:
    """How many looks it takes until a gain is worth a move; a worker's switch costs 1/1500 of it."""
    attained = {2: 0.80, 3: 0.80 + gain}
    return next(number for number in range(1, 100) if moved(looks(attained)) is not None)


@pytest.mark.parametrize(("gain", "num_looks"), [(0.16, 1), (0.11, 2), (0.04, 3), (0.0205, 6), (0.01, 11)])
def test_the_less_is_gained_the_longer_it_must_last(gain: float, num_looks: int) -> None:
    looks = Looks()
    assert looks_until_moved(looks, gain) == num_looks
    assert num_looks == 1 or ENOUGH_REGRET / gain <= num_looks + 1
    assert moved(looks({2: 0.80, 3: 0.80 + min(gain, 0.1)})) is None, "a move begins anew"


@pytest.mark.parametrize("other", [{2: 0.90}, {2: 0.90, 3: 0.902}, {2: 0.90, 1: 0.912}])
def test_a_look_that_does_not_agree_begins_the_long_time_anew(other: dict[int, float]) -> None:
    looks = Looks()
    for look in range(50):
        assert moved(looks(other if look % 8 == 0 else {2: 0.90, 3: 0.912})) is None
    looks.chooser.forget()
    assert moved(looks({2: 0.90, 3: 0.912})) is None


def test_a_move_that_costs_more_than_it_gains_is_not_made() -> None:
    looks = Looks(rate_rps=0.05)
    for _ in range(3):
        assert moved(looks({2: 0.5, 3: 0.9})) is None
    busy = Looks(rate_rps=2.0)
    assert moved(busy({2: 0.5, 3: 0.9})) == 3
    busy.workers = workers(2, 2, load=WorkerLoad(num_running=250, num_decoding=250, num_waiting=900))
    for _ in range(3):
        assert moved(busy({2: 0.85, 3: 0.93})) is None


def test_what_is_better_only_for_now_or_only_in_the_end_can_wait() -> None:
    better, worse = {2: 0.5, 3: 0.9}, {2: 0.9, 3: 0.5}
    looks = Looks()
    for _ in range(3):
        assert moved(looks(better, later=worse)) is None
        assert moved(looks(worse, later=better)) is None


def test_equals_stay_as_they_are() -> None:
    assert moved(Looks()(dict.fromkeys(range(4), 0.7))) is None


def test_the_record_has_the_chosen_and_the_present_split_best_first() -> None:
    choice = Looks()({2: 0.4, 3: 0.95})
    alternatives = choice.alternatives({"s": 2.0})
    assert alternatives[0].split == "3P+1D"
    assert "2P+2D" in [each.split for each in alternatives]
    assert [each.score for each in alternatives] == sorted((a.score for a in alternatives), reverse=True)
    assert {each.num_gpus for each in alternatives} == {8.0}


@pytest.mark.parametrize("absurd", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_no_numbers_move_nothing(absurd: float) -> None:
    looks = Looks()
    for _ in range(3):
        assert moved(looks(dict.fromkeys(range(4), absurd))) is None
        assert moved(looks({2: absurd, 3: 0.9})) is None
    assert moved(looks({2: 0.2, 3: 0.9, 1: absurd})) == 3
