"""By how much to be careful with a prediction, learned from how the predicted turned out."""

from __future__ import annotations

import math

_FORGET_S = 30.0


class PredictionMargin:
    """Grows with each prediction that turned out too low, shrinks with the others, so that a given share is
    not too low (a running quantile). Without news it fades: a margin that lets nobody through ends by itself.

    Args:
        now_s: the time.
        step: how far one outcome moves it, in the unit of the predictions.
        highest: the most it becomes.
        share: of predictions that are not to be too low, 0 to 1.
    """

    def __init__(self, now_s: float, *, step: float, highest: float, share: float) -> None:
        self._step = step
        self._highest = highest
        self._share = share
        self._margin = 0.0
        self._at_s = now_s

    def at(self, now_s: float) -> float:
        """At least 0."""
        self._margin *= math.exp((self._at_s - now_s) / _FORGET_S)
        self._at_s = now_s
        return self._margin

    def observe(self, now_s: float, *, too_low: bool) -> None:
        """How a prediction, with the margin it was given, turned out."""
        margin = self.at(now_s) + self._step * (self._share if too_low else self._share - 1.0)
        self._margin = min(max(margin, 0.0), self._highest)
