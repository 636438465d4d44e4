"""How long answers will be, from those that have ended and those that go on.

After a change those that end first are the short ones. Of the answers that left a class of length, the share
that ended in it is a hazard; the mean follows from all of them (Kaplan and Meier 1958). Whether two parts of
time had answers of the same lengths is told by how many ended in each class, against how many would have if
they had (the log-rank test: Mantel 1966), so that answers which only go on are news too, and by the means of
the two, for where more end early and more go on for long the counts may agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.traffic import ANSWER_CLASS_LIMITS
from planner.level import Measured, means_apart, widest_unchanged

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_UNKNOWN_HAZARD = 0.5
"""Share of the answers in a class that no answer has reached yet that are taken to end in it."""
_PRIOR_ANSWERS = 1.0
"""What is known of all answers counts as this many in each class: most where hardly any have come lately."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLengths:
    """Of the answers of now."""

    mean_tokens: float
    error: float
    """Standard error, as a share of the mean."""
    start: int
    """First sample that tells of them."""


def answer_lengths(answers: Ints, starts: Sequence[int]) -> AnswerLengths:
    """
    Args:
        answers: (samples, 3, classes): answers that reached each class, that ended in it, and their tokens.
        starts: first sample of each candidate window, the shortest first.
    """
    everything: Ints = answers.sum(axis=0)
    if not everything[0].any():
        return AnswerLengths(mean_tokens=1.0, error=1.0, start=0)
    left, ended = _ends(everything)
    prior = (ended + _UNKNOWN_HAZARD) / (left + 1.0)
    lengths = _class_lengths(everything)

    def ends(part: slice) -> Floats:
        return _ends(answers[part].sum(axis=0))

    def apart(one: Floats, other: Floats) -> float:
        # More short ones and more long ones cancel in the one, too few that have ended hide in the other.
        means = means_apart(_mean(one, prior, lengths), _mean(other, prior, lengths))
        return max(lengths_apart(one, other), means)

    start = widest_unchanged(starts, ends, apart)
    mean = _mean(ends(slice(start, None)), prior, lengths)
    return AnswerLengths(mean_tokens=mean.value, error=mean.error_share, start=start)


def lengths_apart(one: Floats, other: Floats) -> float:
    """How far apart the lengths of two groups of answers are, in standard errors.

    Args:
        one, other: (2, classes): answers that left each class, and those of them that ended in it.
    """
    left, ended = one + other
    many = left > 1
    left, ended, (left_one, ended_one) = left[many], ended[many], one[:, many]
    expected = ended * left_one / left
    variance = expected * (1.0 - left_one / left) * (left - ended) / (left - 1.0)
    # One answer that ends where hardly any do is no news, however unlikely it was.
    spread = math.sqrt(max(float(variance.sum()), 1.0))
    return abs(float((ended_one - expected).sum())) / spread


def _ends(answers: Ints) -> Floats:
    """(2, classes) answers that left each class, by ending or by growing out of it, and those that ended."""
    left = answers[1] + np.append(answers[0][1:], 0)
    return np.array((left, answers[1]), dtype=np.float64)


def _mean(ends: Floats, prior: Floats, lengths: Floats) -> Measured:
    left, ended = ends
    hazard = (ended + _PRIOR_ANSWERS * prior) / (left + _PRIOR_ANSWERS)
    alive = np.concatenate(([1.0], np.cumprod(1.0 - hazard)))
    share = alive[:-1] * hazard
    mean = float(share @ lengths) + float(alive[-1] * lengths[-1])
    square = float(share @ lengths**2) + float(alive[-1] * lengths[-1] ** 2)
    num = float(ended.sum()) + 1.0
    return Measured(value=mean, standard_error=math.sqrt(max(square - mean**2, 0.0) / num))


def _class_lengths(answers: Ints) -> Floats:
    """Mean tokens of the answers that ended in each class; the middle of those in which none did."""
    limits = np.array((*ANSWER_CLASS_LIMITS, 2 * ANSWER_CLASS_LIMITS[-1]), dtype=float)
    middles = 0.5 * (limits + np.concatenate(([0.0], limits[:-1])))
    lengths: Floats = np.divide(answers[2], answers[1], out=middles, where=answers[1] > 0)
    return lengths
