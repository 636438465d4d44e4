"""Which workers hold which prompt blocks, precisely: what their streamed events add up to.

Theory of operation. A row is one block some worker holds, whoever and however many do: its name (see
``core.prompt_blocks``) and the number of a set of workers. Sets are kept once each, as bit masks. The blocks
of a prompt mostly share a set, so a set of millions of rows costs a few Python objects, and one prompt is
matched by one vectorized lookup of its names and a Python step where the set changes, not a step a block.

- Lookup: ``BlockRows`` is a hash table in numpy. A bucket is eight names, one cache line, and a name lies in
  one of two buckets, so a lookup takes one gather for all and one for the rest. It looks at the front of a
  prompt first and goes on in growing pieces, so an unknown prompt costs as little as a short one.
- Updates come in batches and are vectorized too: rows that change are grouped by their set.
- A worker goes by losing its bit in every set; no row is touched. A row whose set became empty is dead, and
  is swept up a stretch at a time by later updates.
- The table grows by splitting buckets in place, a few with each update, so no update stalls.

Against a Python dict from name to mask, at ten million blocks and a prompt of 4096: 40 bytes a block instead
of 130, since a dict keeps an object for each name, and lookups at least four times faster, since numpy
overlaps the cache misses that a Python loop takes one by one. See ``benchmarks/prefix_index.py``.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate
from operator import and_
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from router.block_rows import BlockRows, Indices, States

WorkerT = TypeVar("WorkerT", bound=Hashable)

_FIRST_PIECE = 128
"""Blocks of a prompt looked up at first; every further piece is eight times as long."""
_SWEEP = 8192
"""Places looked at for dead rows with every update."""


class PrefixIndex(Generic[WorkerT]):
    """Blocks by worker; answers how much of a prompt's beginning each worker holds.

    Memory is bounded by ``max_blocks``, the different blocks known at a time. Beyond it nothing is thrown
    out: of what is stored, blocks that nobody is known to hold yet are left out, the last of a batch first,
    until evictions make room. The worker that stored them counts as incomplete (``is_complete``) until it is
    cleared or replaced: it may hold more than ``match`` says, never less, and needs no resync, which would
    not help. The same goes for blocks whose set of workers would be one too many: there are a tenth as many
    sets as blocks, while prompts as a whole are held by the same workers and need far fewer. (Evictions are
    never left out. They can add sets beyond that, one for each block held by three or more.)

    Args:
        max_blocks: 24 to 60 bytes each, and some 300 a set.
    """

    def __init__(self, max_blocks: int = 20_000_000) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, not {max_blocks}")
        self._max_blocks = max_blocks
        self._max_sets = max(max_blocks // 10, 1024)
        self._rows = BlockRows(max_blocks)
        self._sets = _WorkerSets()
        self._bits: dict[WorkerT, int] = {}
        self._workers: dict[int, WorkerT] = {}
        self._num_blocks: dict[WorkerT, int] = {}
        self._incomplete: set[WorkerT] = set()

    def __contains__(self, worker_id: WorkerT) -> bool:
        return worker_id in self._bits

    def __len__(self) -> int:
        """Different blocks known."""
        return self._rows.num_used - self._sets.num_dead_rows

    def set_worker(self, worker_id: WorkerT) -> None:
        """Adds a worker that holds nothing yet; one that is known stays as it is."""
        if worker_id in self._bits:
            return
        bit = next(bit for bit in range(len(self._workers) + 1) if bit not in self._workers)
        self._bits[worker_id] = 1 << bit
        self._workers[bit] = worker_id
        self._num_blocks[worker_id] = 0

    def remove_worker(self, worker_id: WorkerT) -> None:
        """Forgets a worker and its blocks; one that is not known is no error."""
        if worker_id in self._bits:
            self.clear(worker_id)
            del self._workers[self._bits.pop(worker_id).bit_length() - 1]
            del self._num_blocks[worker_id]

    def num_blocks(self, worker_id: WorkerT) -> int:
        """Blocks the worker is known to hold."""
        return self._num_blocks.get(worker_id, 0)

    def is_complete(self, worker_id: WorkerT) -> bool:
        """False if blocks of this worker were left out for want of room."""
        return worker_id not in self._incomplete

    def store(self, worker_id: WorkerT, states: States) -> None:
        """The worker holds these blocks from now on; they may repeat.

        Raises:
            ValueError: the worker is not known.
        """
        bit = self._bit(worker_id)
        names = _names(states)
        places = self._rows.find(names)
        absent = names[places < 0]
        self._num_blocks[worker_id] += self._regroup(worker_id, places, bit, add=True)
        if absent.size:
            self._num_blocks[worker_id] += self._add(worker_id, bit, absent)
        self._sweep(_SWEEP)

    def evict(self, worker_id: WorkerT, states: States) -> None:
        """The worker holds these blocks no longer; those it did not hold are no error.

        Raises:
            ValueError: the worker is not known.
        """
        bit = self._bit(worker_id)
        places = self._rows.find(_names(states))
        self._num_blocks[worker_id] -= self._regroup(worker_id, places, bit, add=False)
        self._sweep(_SWEEP)

    def clear(self, worker_id: WorkerT) -> None:
        """The worker holds nothing.

        Raises:
            ValueError: the worker is not known.
        """
        if self._num_blocks.get(worker_id, -1):
            self._sets.discard(self._bit(worker_id))
            self._num_blocks[worker_id] = 0
        self._incomplete.discard(worker_id)

    def replace(self, worker_id: WorkerT, states: States) -> None:
        """A resync: the worker holds these blocks and no others.

        Raises:
            ValueError: the worker is not known.
        """
        self.clear(worker_id)
        self.store(worker_id, states)

    def match(self, states: States) -> dict[WorkerT, int]:
        """How many blocks at the beginning of a prompt each worker holds without a gap.

        Args:
            states: of ``chain_states``, the whole prompt, shape (num_blocks,).

        Returns:
            By worker, only those that hold the first block.
        """
        names = _names(states)
        matched: dict[WorkerT, int] = {}
        alive, start, size = -1, 0, _FIRST_PIECE
        while alive and start < len(names) and self._rows.num_used:
            places = self._rows.find(names[start : start + size])
            absent = np.flatnonzero(places < 0)
            num_known = int(absent[0]) if absent.size else len(places)
            numbers = self._rows.numbers[places[:num_known]]
            alive = self._walk(alive, start, numbers, matched)
            start += num_known
            if absent.size:
                break
            size *= 8
        if alive > 0:
            self._note(alive, start, matched)
        return matched

    def _walk(
        self, alive: int, start: int, numbers: npt.NDArray[np.uint32], matched: dict[WorkerT, int]
    ) -> int:
        """Follows a stretch of known blocks; notes who leaves, returns who still goes on."""
        if not numbers.size:
            return alive
        changes = np.append(0, np.flatnonzero(numbers[1:] != numbers[:-1]) + 1)
        masks = map(self._sets.masks.__getitem__, numbers[changes].tolist())
        depths = (start, *(start + changes).tolist())
        for depth, going_on in zip(depths, accumulate(masks, and_, initial=alive), strict=True):
            if going_on != alive:
                if depth:
                    self._note(alive ^ going_on, depth, matched)
                alive = going_on
                if not alive:
                    break
        return alive

    def _note(self, mask: int, depth: int, matched: dict[WorkerT, int]) -> None:
        while mask:
            bit = mask.bit_length() - 1
            matched[self._workers[bit]] = depth
            mask ^= 1 << bit

    def _bit(self, worker_id: WorkerT) -> int:
        try:
            return self._bits[worker_id]
        except KeyError:
            raise ValueError(f"worker {worker_id!r} is not known: call set_worker first") from None

    def _regroup(self, worker_id: WorkerT, places: Indices, bit: int, add: bool) -> int:
        """Adds or removes a worker at these rows; returns at how many that changed something."""
        places = np.unique(places)
        places = places[np.searchsorted(places, 0) :]
        if not places.size:
            return 0
        old, group, counts = np.unique(self._rows.numbers[places], return_inverse=True, return_counts=True)
        new = np.empty_like(old)
        num_changed = 0
        for index, (number, count) in enumerate(zip(old.tolist(), counts.tolist(), strict=True)):
            mask = self._sets.masks[number]
            new_mask = mask | bit if add else mask & ~bit
            if new_mask == mask:
                new[index] = number
            elif add and len(self._sets) >= self._max_sets and new_mask not in self._sets:
                new[index] = number
                self._incomplete.add(worker_id)
            else:
                new[index] = self._sets.move(number, new_mask, count)
                num_changed += count
        self._rows.numbers[places] = new[group]
        if not add:
            self._rows.free(places[new[group] == 0])
        return num_changed

    def _add(self, worker_id: WorkerT, bit: int, names: States) -> int:
        """Adds rows; returns how many found room."""
        _, first = np.unique(names, return_index=True)
        names = names[np.sort(first)]
        if self._rows.num_used + len(names) > self._max_blocks:
            self._sweep(self._rows.num_places)
        wanted = names[: self._max_blocks - len(self)]
        num_added = self._rows.insert(wanted, number := self._sets.intern(bit))
        self._sets.move(0, bit, num_added)
        if not num_added:
            self._sets.drop_if_unused(number)
        if num_added < len(names):
            self._incomplete.add(worker_id)
        return num_added

    def _sweep(self, num_places: int) -> None:
        if self._sets.num_dead_rows:
            numbers, counts = np.unique(self._rows.sweep(self._sets.is_dead, num_places), return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                self._sets.move(number, 0, count)


def _names(states: States) -> States:
    """0 marks a free place, so the block of that name shares one with its neighbour."""
    return np.maximum(np.asarray(states, np.uint64).reshape(-1), np.uint64(1))


class _WorkerSets:
    """Sets of workers as bit masks, by number; 0 is the empty set. Counts each set's rows.

    Losing a worker may leave two numbers with one mask. That is harmless: new rows go to one of them.
    """

    __slots__ = ("_free", "_num_rows", "_numbers", "is_dead", "masks", "num_dead_rows")

    def __init__(self) -> None:
        self.masks = [0]
        self.is_dead = np.zeros(256, np.bool_)
        """By number: has rows, but no worker."""
        self.num_dead_rows = 0
        self._num_rows = [0]
        self._numbers = {0: 0}
        self._free: list[int] = []

    def __contains__(self, mask: int) -> bool:
        return mask in self._numbers

    def __len__(self) -> int:
        return len(self.masks) - len(self._free)

    def intern(self, mask: int) -> int:
        """The number of a set."""
        number = self._numbers.get(mask)
        if number is None:
            if self._free:
                number = self._free.pop()
                self.masks[number] = mask
            else:
                number = len(self.masks)
                self.masks.append(mask)
                self._num_rows.append(0)
                if number == len(self.is_dead):
                    self.is_dead = np.concatenate([self.is_dead, np.zeros_like(self.is_dead)])
            self._numbers[mask] = number
        return number

    def move(self, number: int, mask: int, num_rows: int) -> int:
        """Rows leave a set for another one; returns the other one's number."""
        new = self.intern(mask)
        self._num_rows[new] += num_rows if new else 0
        if number:
            self._num_rows[number] -= num_rows
            self.num_dead_rows -= num_rows if self.is_dead[number] else 0
            self.drop_if_unused(number)
        return new

    def drop_if_unused(self, number: int) -> None:
        if self._num_rows[number]:
            return
        if self._numbers.get(self.masks[number]) == number:
            del self._numbers[self.masks[number]]
        self.masks[number] = 0
        self.is_dead[number] = False
        self._free.append(number)

    def discard(self, bit: int) -> None:
        """Takes a worker out of all sets."""
        for number, mask in enumerate(self.masks):
            if mask & bit:
                if self._numbers.get(mask) == number:
                    del self._numbers[mask]
                self.masks[number] = mask ^ bit
                if mask == bit:
                    self.is_dead[number] = True
                    self.num_dead_rows += self._num_rows[number]
                else:
                    self._numbers.setdefault(mask ^ bit, number)
