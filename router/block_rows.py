"""A hash table in numpy from names of prompt blocks to numbers, many names a call."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

States = npt.NDArray[np.uint64]
"""Names of prompt blocks, see ``core.prompt_blocks``."""
Indices = npt.NDArray[np.int64]

_WIDTH = 8
_CROWDED = 5
"""Names in a first bucket from which on the second one is considered."""
_SPLIT_FROM = 0.4
_SPLIT_BY = 0.5
"""Shares of places used where the splitting of all buckets begins, and where it is done."""
_FACTORS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))


class BlockRows:
    """A hash table from names to numbers of sets.

    A name goes to its first bucket, or where that is crowded to the emptier of its two (after Azar et al.,
    Balanced Allocations, 1994), so that one gather finds four of five. At the loads kept here both are full
    in fewer than one of a billion cases, and the name is then left out. ``_base`` is a power of 2, and each
    of the first ``_num_split`` buckets gave about half its names, by one more bit of the hash, to the bucket
    ``_base`` further on (linear hashing, Litwin 1980). Arrays have their final size from the start; the
    operating system backs what is written to.
    """

    __slots__ = ("_base", "_cursor", "_names", "_num_split", "num_used", "numbers")

    def __init__(self, max_rows: int) -> None:
        num_buckets = 1
        while num_buckets * _WIDTH * _SPLIT_BY < max_rows:
            num_buckets *= 2
        self._names = np.zeros((num_buckets, _WIDTH), np.uint64)
        self.numbers = np.zeros(num_buckets * _WIDTH, np.uint32)
        """By place; 0 where it is free."""
        self.num_used = 0
        self._base = min(num_buckets, 64)
        self._num_split = 0
        self._cursor = 0

    @property
    def num_places(self) -> int:
        return (self._base + self._num_split) * _WIDTH

    def find(self, names: States) -> Indices:
        """The place of each name, -1 where it has none."""
        places = self._look(names, 0)
        rest = np.flatnonzero(places < 0)
        if rest.size:
            places[rest] = self._look(names[rest], 1)
        return places

    def insert(self, names: States, number: int) -> int:
        """Adds different names that have no place; returns how many found one."""
        self._split(len(names))
        by_place = self._names.reshape(-1)
        num_before = self.num_used
        while names.size:
            first, second = self._buckets(names, 0), self._buckets(names, 1)
            used_first = (self._names[first] != 0).sum(axis=1)
            used_second = (self._names[second] != 0).sum(axis=1)
            goes_on = (used_first >= _CROWDED) & (used_second < used_first)
            buckets = np.where(goes_on, second, first)
            has_room = np.where(goes_on, used_second, used_first) < _WIDTH
            names, buckets = names[has_room], buckets[has_room]
            places = buckets * _WIDTH + (self._names[buckets] == 0).argmax(axis=1)
            by_place[places] = names
            # Where several wanted one place the last one has it; the others try again.
            has_place = by_place[places] == names
            self.numbers[places] = number
            self.num_used += int(has_place.sum())
            names = names[~has_place]
        return self.num_used - num_before

    def free(self, places: Indices) -> None:
        self._names.reshape(-1)[places] = 0
        self.numbers[places] = 0
        self.num_used -= len(places)

    def sweep(self, is_dead: npt.NDArray[np.bool_], num_places: int) -> npt.NDArray[np.uint32]:
        """Frees the dead rows in the next stretch of places; returns their sets."""
        start = self._cursor if self._cursor < self.num_places else 0
        self._cursor = start + num_places
        if num_places >= self.num_places:
            start = self._cursor = 0
        stretch = self.numbers[start : min(start + num_places, self.num_places)]
        places = np.flatnonzero(is_dead[stretch])
        numbers = stretch[places]
        self.free(places + start)
        return numbers

    def _look(self, names: States, which: int) -> Indices:
        """The place of each name in its first or second bucket, or -1."""
        buckets = self._buckets(names, which)
        hits = np.flatnonzero(self._names.take(buckets, axis=0) == names[:, None])
        rows = hits >> 3
        places = np.full(len(names), -1, np.int64)
        places[rows] = hits + (buckets[rows] - rows) * _WIDTH
        return places

    def _buckets(self, names: States, which: int) -> Indices:
        buckets = _hash(names, which)
        buckets &= 2 * self._base - 1
        buckets -= (buckets >= self._base + self._num_split) * self._base
        return buckets

    def _split(self, num_new: int) -> None:
        """Splits buckets in step with the new rows; the arrays' size ends it."""
        while self._base < len(self._names):
            limit = self._base * _WIDTH
            share = ((self.num_used + num_new) / limit - _SPLIT_FROM) / (_SPLIT_BY - _SPLIT_FROM)
            end = min(int(share * self._base) + 1, self._base) if share > 0 else 0
            if end > self._num_split:
                self._split_buckets(self._num_split, end)
            if end < self._base:
                return
            self._base *= 2
            self._num_split = 0

    def _split_buckets(self, start: int, end: int) -> None:
        base = self._base
        names = self._names[start:end]
        numbers = self.numbers.reshape(-1, _WIDTH)[start:end]
        first, second = (_hash(names, which) & (2 * base - 1) for which in (0, 1))
        is_first = (first & (base - 1)) == np.arange(start, end)[:, None]
        goes = np.where(is_first, first, second) >= base
        self._names[base + start : base + end] = np.where(goes, names, 0)
        self.numbers.reshape(-1, _WIDTH)[base + start : base + end] = np.where(goes, numbers, 0)
        names[goes] = 0
        numbers[goes] = 0
        self._num_split = end


def _hash(names: States, which: int) -> Indices:
    """Below 2^32."""
    hashes = names * _FACTORS[which]
    hashes >>= np.uint64(32)
    return hashes.view(np.int64)
