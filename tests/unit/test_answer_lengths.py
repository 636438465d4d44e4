"""Whether two groups of answers have the same lengths, told by what ended and by what goes on."""

from __future__ import annotations

import numpy as np
import pytest

from core.traffic import NUM_ANSWER_CLASSES
from planner.answer_lengths import Floats, Ints, answer_lengths, lengths_apart
from planner.level import CONFIDENCE


def group(hazard: float, num: int, *, num_classes: int = 10, seed: int = 0) -> Floats:
    """(2, classes): of those that left each class so many ended there."""
    left, ended, rng = np.zeros(num_classes), np.zeros(num_classes), np.random.default_rng(seed)
    for index in range(num_classes):
        left[index], ended[index] = num, rng.binomial(num, hazard)
        num -= int(ended[index])
    return np.array((left, ended))


def test_groups_of_one_kind_are_hardly_ever_told_apart() -> None:
    apart = [
        lengths_apart(group(0.3, 40, seed=seed), group(0.3, 400, seed=1000 + seed)) for seed in range(1000)
    ]
    assert np.mean(np.array(apart) > CONFIDENCE) < 0.005
    assert np.std(apart) < 1.2


def test_longer_and_shorter_answers_are() -> None:
    assert lengths_apart(group(0.1, 60), group(0.5, 400, seed=1)) > CONFIDENCE
    assert lengths_apart(group(0.5, 60), group(0.1, 400, seed=1)) > CONFIDENCE


def test_answers_that_go_on_where_all_others_ended_are_news() -> None:
    onwards = np.array(([30.0] * 3 + [0.0] * 7, [0.0] * 10))
    assert lengths_apart(onwards, group(0.6, 400)) > CONFIDENCE


def test_one_answer_that_ends_where_hardly_any_do_is_none() -> None:
    one = np.array(([1.0, 0.0], [1.0, 0.0]))
    many = np.array(([500.0, 499.0], [1.0, 100.0]))
    assert lengths_apart(one, many) < 1.0


@pytest.mark.parametrize("other", [np.zeros((2, 10)), group(0.3, 100)])
def test_nothing_agrees_with_everything(other: Floats) -> None:
    assert lengths_apart(np.zeros((2, 10)), other) == 0.0


def sample(*lengths: tuple[int, int, int]) -> Ints:
    """(3, classes) of answers that came and ended: how many, in which class, of how many tokens."""
    rows = np.zeros((3, NUM_ANSWER_CLASSES), dtype=np.int64)
    for num, index, tokens in lengths:
        rows[0, : index + 1] += num
        rows[1, index] += num
        rows[2, index] += num * tokens
    return rows


def test_more_short_ones_and_more_long_ones_are_a_change_though_as_many_end_as_should() -> None:
    before, after = sample((30, 10, 100)), sample((15, 5, 20), (15, 14, 400))
    answers = np.array([before] * 20 + [after] * 3)
    found = answer_lengths(answers, [21, 20, 15, 0])
    assert found.start == 20
    assert found.mean_tokens == pytest.approx(210, rel=0.1)


def test_before_any_answer_nothing_is_known() -> None:
    found = answer_lengths(np.zeros((3, 3, NUM_ANSWER_CLASSES), dtype=np.int64), [2, 0])
    assert (found.mean_tokens, found.error, found.start) == (1.0, 1.0, 0)
