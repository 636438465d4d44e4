"""How far back to look: the longest recent time over which a figure has not changed.

The rule of intersecting confidence intervals (Goldenshluger & Nemirovski 1997): windows grow as long as
all their confidence intervals have a point in common. A steady load is measured over minutes, with little
noise; after a jump only what came since counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

CONFIDENCE = 2.5
"""Half width of an interval, in standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A figure from one window."""

    value: float
    standard_error: float


def widest_consistent(windows: Iterable[Measured]) -> tuple[int, Measured]:
    """The last window, shortest first, whose interval meets those of all shorter ones.

    Returns:
        Its index and figure.

    Raises:
        ValueError: there is no window.
    """
    low, high, found = float("-inf"), float("inf"), None
    for index, window in enumerate(windows):
        reach = CONFIDENCE * window.standard_error
        low, high = max(low, window.value - reach), min(high, window.value + reach)
        if found is not None and low > high:
            break
        found = index, window
    if found is None:
        raise ValueError("there is no window")
    return found
