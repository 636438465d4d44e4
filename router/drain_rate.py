"""How fast a waiting line drains."""

from __future__ import annotations

import math

_MIN_BUSY_S = 0.2


class DrainRate:
    """Work sent per second while somebody waits; what was long ago counts less.

    Time in which nobody waits says nothing of how fast the line could drain, and is left out.

    Args:
        window_s: time constant, of waiting time.
    """

    def __init__(self, window_s: float = 5.0) -> None:
        self._window_s = window_s
        self._work = 0.0
        self._busy_s = 0.0
        self._since_s: float | None = None
        """Up to when waiting time is counted; None while nobody waits."""

    def begin(self, now_s: float) -> None:
        """Somebody waits from now on."""
        if self._since_s is None:
            self._since_s = now_s

    def end(self, now_s: float) -> None:
        """Nobody waits any more."""
        self._count(now_s)
        self._since_s = None

    def sent(self, now_s: float, work: float) -> None:
        """One that waited has been sent."""
        self._count(now_s)
        self._work += work

    def per_s(self, now_s: float) -> float | None:
        """None while too little has been seen."""
        self._count(now_s)
        return self._work / self._busy_s if self._work and self._busy_s >= _MIN_BUSY_S else None

    def _count(self, now_s: float) -> None:
        if self._since_s is None:
            return
        kept = math.exp((self._since_s - now_s) / self._window_s)
        self._work *= kept
        self._busy_s = self._busy_s * kept + self._window_s * (1.0 - kept)
        self._since_s = now_s
