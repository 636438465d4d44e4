"""The virtual clock: callbacks in order of time, those of one time in the order they were made."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

_Entry = tuple[float, int, Callable[..., None], tuple[Any, ...]]


class EventQueue:
    """Runs what was scheduled; a callback gets the time and its arguments, and may schedule more."""

    __slots__ = ("_heap", "_num_scheduled", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[_Entry] = []
        self._num_scheduled = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, time_s: float, callback: Callable[..., None], *args: Any) -> None:
        """Schedules ``callback(time_s, *args)``; a time that has passed means now."""
        self._num_scheduled += 1
        if time_s < self.now_s:
            time_s = self.now_s
        heappush(self._heap, (time_s, self._num_scheduled, callback, args))

    def run_until(self, time_s: float) -> None:
        """Runs what is scheduled up to a time, and moves time there."""
        while self._heap and self._heap[0][0] <= time_s:
            self.run_next()
        self.now_s = max(self.now_s, time_s)

    def run_next(self) -> None:
        """Moves time to the next callback and runs it.

        Raises:
            IndexError: nothing is scheduled.
        """
        self.now_s, _, callback, args = heappop(self._heap)
        callback(self.now_s, *args)
