"""How far back a figure has not changed."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from planner.level import Measured, widest_consistent


def parts(*figures: tuple[float, float]) -> list[Measured]:
    return [Measured(value=value, standard_error=error) for value, error in figures]


def test_as_long_as_what_is_added_agrees_the_longest_is_taken() -> None:
    windows = parts((10.5, 2.0), (9.5, 1.0), (10.1, 0.3))
    assert widest_consistent(windows, parts((9.0, 2.0), (10.3, 0.4))) == 2


def test_a_part_that_disagrees_ends_the_search() -> None:
    windows = parts((30.0, 2.0), (29.0, 1.0), (15.0, 0.5), (29.0, 0.1))
    added = parts((28.0, 2.0), (8.0, 0.5), (30.0, 0.1))
    assert widest_consistent(windows, added) == 1


def test_a_slow_drift_is_noticed_even_if_neighbours_agree() -> None:
    per_second = np.arange(40.0)
    starts = [38, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0]
    windows = [Measured(value=float(per_second[start:].mean()), standard_error=2.0) for start in starts]
    added = [
        Measured(value=float(per_second[start:newer].mean()), standard_error=2.0)
        for newer, start in pairwise(starts)
    ]
    assert 0 < widest_consistent(windows, added) < len(starts) - 1


def test_a_part_that_knows_nothing_agrees_with_everything() -> None:
    windows = parts((0.0, math.inf), (7.0, 0.1), (7.1, 0.1))
    assert widest_consistent(windows, parts((7.0, 0.1), (0.0, math.inf))) == 2


def test_one_window_is_taken_and_none_is_refused() -> None:
    assert widest_consistent(parts((3.0, 0.0)), []) == 0
    with pytest.raises(ValueError, match="0 windows"):
        widest_consistent([], [])
