"""How full a worker's prefix cache is and how fast it turns over, by what was sent to it."""

from __future__ import annotations

import math
from collections import deque

_NUM_MARKS = 64
"""How finely the filling of a whole cache is remembered."""


class CacheFill:
    """Counts the tokens that a worker computes and caches, as if the oldest made room for the newest.

    Args:
        capacity_tokens: of its KV cache.
    """

    __slots__ = ("_capacity_tokens", "_marks", "_total_tokens")

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._total_tokens = 0
        self._marks: deque[tuple[float, int]] = deque()
        """When the total reached what, for what is still there; oldest first."""

    @property
    def free_tokens(self) -> int:
        """What fits before anything is evicted; once full, a cache stays full."""
        return max(0, self._capacity_tokens - self._total_tokens)

    def filled(self, now_s: float, num_tokens: int) -> None:
        """A prompt was sent of which so many tokens are not cached there."""
        marks, grain_tokens = self._marks, self._capacity_tokens // _NUM_MARKS
        self._total_tokens += num_tokens
        if len(marks) > 1 and self._total_tokens - marks[-2][1] <= grain_tokens:
            marks.pop()
        marks.append((now_s, self._total_tokens))
        while marks[0][1] <= self._total_tokens - self._capacity_tokens:
            marks.popleft()

    def oldest_at_s(self) -> float:
        """When what will be evicted next came; minus infinity while there is room."""
        return -math.inf if self.free_tokens else self._marks[0][0]
