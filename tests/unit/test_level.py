"""How far back a figure has not changed."""

from __future__ import annotations

import pytest

from planner.level import Measured, widest_consistent


def windows(*figures: tuple[float, float]) -> list[Measured]:
    return [Measured(value=value, standard_error=error) for value, error in figures]


def test_as_long_as_windows_agree_the_longest_is_taken() -> None:
    index, figure = widest_consistent(windows((10.5, 2.0), (9.5, 1.0), (10.1, 0.3)))
    assert (index, figure.value) == (2, 10.1)


def test_a_window_that_disagrees_with_a_shorter_one_ends_the_search() -> None:
    index, figure = widest_consistent(windows((30.0, 2.0), (29.0, 1.0), (15.0, 0.5), (29.0, 0.1)))
    assert (index, figure.value) == (1, 29.0)


def test_a_slow_drift_is_noticed_even_if_neighbours_agree() -> None:
    drifting = [(10.0 - step, 1.0) for step in range(10)]
    index, _ = widest_consistent(windows(*drifting))
    assert 0 < index < 9


def test_a_window_that_knows_nothing_agrees_with_everything() -> None:
    index, _ = widest_consistent(windows((0.0, float("inf")), (7.0, 0.1), (7.1, 0.1)))
    assert index == 2


def test_one_window_is_taken_and_none_is_refused() -> None:
    assert widest_consistent(windows((3.0, 0.0)))[0] == 0
    with pytest.raises(ValueError, match="no window"):
        widest_consistent([])
