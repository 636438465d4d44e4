"""When a worker will have computed the prompts it was sent, by this router and by others."""

from __future__ import annotations

import math

_INFLOW_WINDOW_S = 1.0
"""Time constant of what is known of the other routers."""
_MAX_INFLOW = 0.95


class PrefillQueue:
    """One worker's queue of prompts in seconds of computing, from one router's view.

    The worker's last word may be old, and other routers go on sending: how much is learned from one word
    to the next, as what the queue holds beyond what was left of it and what this router has sent. Without
    others, what this router has sent and not heard back of is all there is.
    """

    __slots__ = ("_foreign_s", "_heard_at_s", "_inflow", "_own_free_at_s", "_own_s", "_since_s", "_total_s")

    def __init__(self, now_s: float) -> None:
        self._own_s = 0.0
        """Sent by this router and not answered."""
        self._own_free_at_s = 0.0
        """When that will have been computed, were there no others."""
        self._foreign_s = 0.0
        """Sent by others, by the last word."""
        self._total_s = 0.0
        """The whole queue by the last word..."""
        self._since_s = 0.0
        """...and what this router has sent since."""
        self._heard_at_s = now_s
        self._inflow = 0.0
        """Seconds of computing that others send a second; the worker computes one."""

    def sent(self, now_s: float, work_s: float) -> None:
        """This router sends a prompt."""
        self._own_s += work_s
        self._own_free_at_s = max(self._own_free_at_s, now_s) + work_s
        self._since_s += work_s

    def ended(self, now_s: float, work_s: float, *, none_left: bool) -> None:
        """A prompt of this router was answered, or will not be; what is still out is computed from now on."""
        self._own_s = 0.0 if none_left else self._own_s - work_s
        self._own_free_at_s = now_s + self._own_s

    def heard(self, now_s: float, foreign_s: float) -> None:
        """The worker's word: how much other routers have in its queue, beside what this one has."""
        age_s = now_s - self._heard_at_s
        total_s = self._own_s + foreign_s
        if age_s > 0.0 and (foreign_s or self._foreign_s or self._inflow):
            inflow = 0.0
            if foreign_s:
                inflow = (total_s - self._total_s - self._since_s) / age_s + 1.0
            weight = 1.0 - math.exp(-age_s / _INFLOW_WINDOW_S)
            self._inflow += weight * (min(max(inflow, 0.0), _MAX_INFLOW) - self._inflow)
        self._foreign_s, self._total_s, self._since_s = foreign_s, total_s, 0.0
        self._heard_at_s = now_s

    @property
    def shared(self) -> bool:
        """Whether others send here: :meth:`free_at_s` then moves on by itself."""
        return self._inflow > 0.0 or self._foreign_s > 0.0

    def free_at_s(self, now_s: float) -> float:
        """When it will have computed what it has; in the past if it has nothing."""
        if not self.shared:
            return self._own_free_at_s
        left_s = self._total_s + self._since_s - (now_s - self._heard_at_s) * (1.0 - self._inflow)
        return max(self._own_free_at_s, now_s + left_s)
