"""How far back to look: the longest recent time over which a figure has not changed.

Windows grow back in time as long as what each adds agrees with the windows before it (windows cut where
their parts differ: Bifet and Gavaldà 2007). Parts of time that do not overlap are measured independently, so
that a change is noticed sooner than by comparing a window with a longer one that holds it. A steady load is
measured over minutes, with little noise; after a jump only what came since counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 3.5
"""Standard errors by which two parts of a steady load hardly ever differ, with a dozen windows a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A figure from one part of time."""

    value: float
    standard_error: float


def widest_consistent(windows: Sequence[Measured], added: Sequence[Measured]) -> int:
    """The index of the last window all of whose additions agree with each of the windows before them.

    Args:
        windows: shortest first; each begins earlier than the one before, and all end now.
        added: of each window but the first, the part that the one before it has not.

    Raises:
        ValueError: there is no window, or the numbers do not fit.
    """
    if len(windows) != len(added) + 1:
        raise ValueError(f"{len(windows)} windows have {len(windows) - 1} additions, not {len(added)}")
    for index, part in enumerate(added):
        if any(_differ(part, window) for window in windows[: index + 1]):
            return index
    return len(added)


def _differ(one: Measured, other: Measured) -> bool:
    error = math.hypot(one.standard_error, other.standard_error)
    return abs(one.value - other.value) > CONFIDENCE * error
