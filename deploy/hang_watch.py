"""Whether an engine answers: a decision on probes that somebody else sends.

An engine takes a probe between two steps, so it may be silent for as long as its longest step. Only time in
which the watching process itself ran counts: one that was stopped knows nothing of its engine.
"""

from __future__ import annotations

_LONGEST_GAP_S = 2.0
"""Between two looks; what goes beyond was the watcher's own absence."""
_LOST_AFTER = 3.0
"""Times the limit."""


class HangWatch:
    """One engine's.

    Args:
        limit_s: silence after which the engine counts as hung.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._looked_at_s: float | None = None
        self.silent_s = 0.0
        """For how long a probe has waited for its answer."""

    @property
    def hung(self) -> bool:
        """It should get nothing new; it may come back."""
        return self.silent_s >= self._limit_s

    @property
    def lost(self) -> bool:
        """It has been hung for so long that another one should take its place."""
        return self.silent_s >= _LOST_AFTER * self._limit_s

    def look(self, now_s: float) -> None:
        """To be called about every quarter of a second while a probe waits."""
        if self._looked_at_s is not None:
            self.silent_s += min(now_s - self._looked_at_s, _LONGEST_GAP_S)
        self._looked_at_s = now_s

    def answered(self) -> None:
        """The probe is back."""
        self._looked_at_s = None
        self.silent_s = 0.0
