"""How far back to look: the longest recent time over which a figure has not changed.

Windows grow back in time as long as what each adds agrees with the windows before it (windows cut where
their parts differ: Bifet and Gavaldà 2007). Parts of time that do not overlap are measured independently, so
that a change is noticed sooner than by comparing a window with a longer one that holds it. A steady load is
measured over minutes, with little noise; after a jump only what came since counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

CONFIDENCE = 3.5
"""Standard errors by which two parts of a steady load hardly ever differ, dozens of pairs being compared."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A figure from one part of time."""

    value: float
    standard_error: float

    @property
    def error_share(self) -> float:
        return self.standard_error / self.value if self.value > 0 else 1.0


def widest_unchanged(
    starts: Sequence[int], measure: Callable[[slice], T], distance: Callable[[T, T], float]
) -> int:
    """The first sample of the widest window over which the figure has not changed.

    Args:
        starts: first sample of each candidate, which all end with the last sample; the shortest first.
        measure: the figure over some samples.
        distance: between two figures, in standard errors.

    Raises:
        ValueError: there is no candidate.
    """
    if not starts:
        raise ValueError("there is no window")
    windows: list[T] = []
    for newer, start in pairwise(starts):
        windows.append(measure(slice(newer, None)))
        part = measure(slice(start, newer))
        if any(distance(part, window) > CONFIDENCE for window in windows):
            return newer
    return starts[-1]


def means_apart(one: Measured, other: Measured) -> float:
    """How far two independent figures are from each other, in standard errors of their difference."""
    error = math.hypot(one.standard_error, other.standard_error)
    if one.value == other.value or math.isinf(error):
        return 0.0
    return abs(one.value - other.value) / error if error else math.inf
