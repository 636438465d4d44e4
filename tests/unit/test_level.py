"""How far back a figure has not changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from planner.level import Measured, means_apart, widest_unchanged


def since(counts: Sequence[float], starts: Sequence[int], error: float = 1.0) -> int:
    """First sample of the widest window; each sample has the same error."""
    samples = np.array(counts, dtype=float)

    def measure(part: slice) -> Measured:
        return Measured(
            value=float(samples[part].mean()), standard_error=error / math.sqrt(len(samples[part]))
        )

    return widest_unchanged(starts, measure, means_apart)


def test_a_level_that_stays_is_measured_over_all_of_it() -> None:
    assert since([10.0, 9.0, 11.0, 10.0, 9.5, 10.5], [4, 2, 0]) == 0


def test_after_a_jump_only_what_came_since_counts() -> None:
    assert since([10.0, 10.0, 10.0, 20.0, 20.0, 20.0], [5, 4, 3, 2, 0]) == 3


def test_what_was_alike_before_a_jump_does_not_come_back() -> None:
    assert since([20.0, 20.0, 5.0, 5.0, 20.0, 20.0], [4, 2, 0]) == 4


def test_a_slow_drift_is_noticed_even_if_neighbours_agree() -> None:
    starts = list(range(38, -1, -2))
    assert 0 < since(list(range(40)), starts, error=4.0) < 38


def test_a_part_that_knows_nothing_agrees_with_everything() -> None:
    nothing, known = Measured(value=0.0, standard_error=math.inf), Measured(value=7.0, standard_error=0.1)
    assert means_apart(nothing, known) == means_apart(known, nothing) == 0.0


def test_sure_figures_agree_only_if_they_are_the_same() -> None:
    three, four = (Measured(value=value, standard_error=0.0) for value in (3.0, 4.0))
    assert means_apart(three, three) == 0.0
    assert means_apart(three, four) == math.inf


def test_one_window_is_taken_and_none_is_refused() -> None:
    assert since([3.0], [0]) == 0
    with pytest.raises(ValueError, match="no window"):
        since([3.0], [])
