"""Keeps requests away from a worker that fails them, until one of them has come back well."""

from __future__ import annotations

from core.clock import Clock

FAILURES = 3
"""In a row; requests that run at the same time count too."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class CircuitBreaker:
    """One worker start's, in one router.

    Closed, it lets everything through. After :data:`FAILURES` failures without a success it opens: nothing
    goes there for a pause. Then one request may try; if that fails too, the next pause is twice as long.
    """

    __slots__ = ("_clock", "_num_failures", "_on_trial", "_open_until_s", "_pause_s", "num_opened")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._num_failures = 0
        self._pause_s = 0.0
        """Zero while it is closed."""
        self._open_until_s = 0.0
        self._on_trial = False
        self.num_opened = 0
        """How often it has opened, or stayed open because a trial failed."""

    @property
    def is_open(self) -> bool:
        """Nothing may be sent now."""
        return bool(self._pause_s) and self._clock.now_s() < self._open_until_s

    def chosen(self) -> None:
        """A request will go there. If it is a trial, no other goes before its time is over."""
        if self._pause_s and not self.is_open:
            self._on_trial = True
            self._open_until_s = self._clock.now_s() + self._pause_s

    def answered(self) -> None:
        """Something came back from there: a trial is over, and good so far."""
        self._pause_s = 0.0
        self._on_trial = False

    def succeeded(self) -> None:
        """A leg came to its end there."""
        self.answered()
        self._num_failures = 0

    def failed(self) -> None:
        """A request was lost there, or not answered in time."""
        self._num_failures += 1
        if self._num_failures < FAILURES or (self.is_open and not self._on_trial):
            return
        self._on_trial = False
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) or FIRST_PAUSE_S
        self._open_until_s = self._clock.now_s() + self._pause_s
        self.num_opened += 1
