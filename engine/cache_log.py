"""What an engine's prefix cache holds, and how it came to it: for those who want to follow."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

_STORED, _EVICTED = 1, -1


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheChange:
    """One thing that happened to the cache."""

    kind: Literal["store", "evict", "clear"]
    states: list[int]
    """Names of blocks as ``core.prompt_blocks`` makes them; empty for ``clear``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheNews:
    """What a follower who knew the cache as of ``after_seq`` has to learn to know it as of ``seq``."""

    after_seq: int
    seq: int
    reset: bool
    """Forget everything first: ``stored`` is all there is."""
    stored: bytes
    """uint64 little-endian [num_stored], no state twice, in no order."""
    removed: bytes
    """uint64 little-endian [num_removed]; no state is also in ``stored``."""


class CacheLog:
    """States of resident blocks, and the latest changes of them.

    Every state that enters or leaves counts one sequence number; a clear counts one. To store what is
    there and to evict what is not changes nothing. Not for use from several threads.

    Args:
        max_changes: changes kept at least, and at most twice as many; who is further behind gets a
            snapshot. 17 bytes each.
    """

    def __init__(self, max_changes: int = 1 << 16) -> None:
        self._max_changes = max_changes
        self._index: dict[int, int] = {}
        # The keys of _index without a gap, so that a snapshot is one copy.
        self._resident = array("Q")
        self._changed = array("Q")
        self._kinds = array("b")
        self._base_seq = 0
        self._listeners: set[Callable[[], None]] = set()

    @property
    def seq(self) -> int:
        return self._base_seq + len(self._changed)

    def __len__(self) -> int:
        return len(self._resident)

    def __contains__(self, state: int) -> bool:
        return state in self._index

    def store(self, states: Iterable[int]) -> None:
        index, resident = self._index, self._resident
        for state in states:
            if state not in index:
                index[state] = len(resident)
                resident.append(state)
                self._note(state, _STORED)
        self._tell()

    def evict(self, states: Iterable[int]) -> None:
        index, resident = self._index, self._resident
        for state in states:
            place = index.pop(state, None)
            if place is None:
                continue
            last = resident.pop()
            if last != state:
                resident[place] = last
                index[last] = place
            self._note(state, _EVICTED)
        self._tell()

    def clear(self) -> None:
        """Nothing is resident any more, or nothing is known of what is."""
        self._base_seq = self.seq + 1
        self._index.clear()
        for column in (self._resident, self._changed, self._kinds):
            del column[:]
        self._tell()

    def apply(self, changes: Iterable[CacheChange]) -> None:
        for change in changes:
            if change.kind == "store":
                self.store(change.states)
            elif change.kind == "evict":
                self.evict(change.states)
            else:
                self.clear()

    def since(self, seq: int | None) -> CacheNews:
        """What happened after ``seq``, as one net change.

        Returns:
            A snapshot if ``seq`` is None, was never reached, or is further back than the log.
        """
        if seq is None or not self._base_seq <= seq <= self.seq:
            return CacheNews(
                after_seq=0, seq=self.seq, reset=True, stored=_packed(self._resident), removed=b""
            )
        first = seq - self._base_seq
        states, kinds = np.asarray(self._changed[first:]), np.asarray(self._kinds[first:])
        if kinds.size and kinds.min() != kinds.max():
            # A state enters and leaves by turns, so its changes add up to what is left of them.
            states, groups = np.unique(states, return_inverse=True)
            kinds = np.bincount(groups, weights=kinds)
        return CacheNews(
            after_seq=seq,
            seq=self.seq,
            reset=False,
            stored=_packed(states[kinds == _STORED]),
            removed=_packed(states[kinds == _EVICTED]),
        )

    def listen(self, on_change: Callable[[], None]) -> Callable[[], None]:
        """Calls ``on_change`` after every change; it has to be quick.

        Returns:
            What ends that.
        """
        self._listeners.add(on_change)
        return lambda: self._listeners.discard(on_change)

    def _note(self, state: int, kind: int) -> None:
        self._changed.append(state)
        self._kinds.append(kind)

    def _tell(self) -> None:
        if (excess := len(self._changed) - self._max_changes) > self._max_changes:
            del self._changed[:excess], self._kinds[:excess]
            self._base_seq += excess
        for on_change in self._listeners:
            on_change()


def _packed(states: array[int] | np.ndarray) -> bytes:
    return np.asarray(states, dtype="<u8").tobytes()
