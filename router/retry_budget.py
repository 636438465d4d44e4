"""How often requests may be begun anew, so that trouble is not answered with a storm of work."""

from __future__ import annotations

from core.clock import Clock

SHARE = 0.2
"""Retries a router may make for each request it takes, beyond each request's first."""
FLOOR_PER_S = 1.0
"""Such retries a router may make in any case."""
_BURST_S = 30.0
"""What has not been used is kept for so long at the floor's rate."""


class RetryBudget:
    """One router's.

    A request's first retry is always granted: a worker that dies with two hundred answers costs two hundred
    retries, and at most doubles the work. Further ones are for requests that fail wherever they go, and
    those must not take over the cluster.
    """

    def __init__(self, clock: Clock, *, share: float = SHARE, floor_per_s: float = FLOOR_PER_S) -> None:
        self._clock = clock
        self._share = share
        self._floor_per_s = floor_per_s
        self._most = _BURST_S * floor_per_s
        self._left = self._most
        self._at_s = clock.now_s()

    def began(self) -> None:
        """A request was taken."""
        self._left = min(self._most, self._left + self._share)

    def grant(self, num_before: int) -> bool:
        """Whether a request begun anew ``num_before`` times may be so once more; if so, it counts."""
        if num_before == 0:
            return True
        now_s = self._clock.now_s()
        self._left = min(self._most, self._left + self._floor_per_s * (now_s - self._at_s))
        self._at_s = now_s
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Tries:
    """One request's: where it has failed, and whether it may be begun anew.

    Args:
        limit: retries at most. A request that kills what it runs on takes one worker more than that with it.
    """

    def __init__(self, budget: RetryBudget, limit: int) -> None:
        self._budget = budget
        self._limit = limit
        self._num_retries = 0
        self._silent_at: list[str] = []
        self._lost_at: list[str] = []
        self._refused_by: list[str] = []
        self.num_refusals = 0

    @property
    def excluded(self) -> list[str]:
        """Workers that are not asked now."""
        return self._silent_at + self._lost_at + self._refused_by

    def failed(self, worker_id: str, *, silent: bool = False, progressed: bool = False) -> bool:
        """A worker was lost. Returns whether the request may go on elsewhere.

        Args:
            silent: it said nothing for too long, and may well go on doing so.
            progressed: the answer had grown there. What does so again and again fails nowhere by itself.
        """
        (self._silent_at if silent else self._lost_at).append(worker_id)
        num_before = 0 if progressed else self._num_retries
        if self._num_retries >= self._limit or not self._budget.grant(num_before):
            return False
        self._num_retries += 1
        return True

    def refused(self, worker_id: str) -> None:
        """A worker did not take it, which costs nearly nothing."""
        self._refused_by.append(worker_id)
        self.num_refusals += 1

    def forgive(self, *, silent_too: bool = False) -> None:
        """Nobody else is there: who refused, or was lost and is back, may be asked again."""
        self._refused_by.clear()
        self._lost_at.clear()
        if silent_too:
            self._silent_at.clear()
