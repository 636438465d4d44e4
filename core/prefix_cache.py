"""An automatic prefix cache: which hashed pieces of KV are resident, and which may be evicted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import islice

BlockHash = Hashable
"""Names the content of one piece of KV and of everything in front of it."""


class PrefixCache:
    """Reference counts of resident pieces; pieces nobody refers to are idle, oldest first.

    Follows vllm/v1/core/block_pool.py: a piece stays resident after its last user until its room is
    needed, and of one sequence's pieces the last is evicted first.
    """

    __slots__ = ("_idle", "_num_users", "changes")

    def __init__(self) -> None:
        self.changes: list[tuple[BlockHash, bool]] | None = None
        """A list notes every piece that becomes resident (True) or is evicted (False); None notes nothing."""
        self._num_users: dict[BlockHash, int] = {}
        self._idle: dict[BlockHash, None] = {}

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def match(self, hashes: Sequence[BlockHash], limit: int) -> int:
        """How many of the first ``limit`` hashes are resident without a gap."""
        num_hits = 0
        for piece in islice(hashes, max(limit, 0)):
            if piece not in self._num_users:
                break
            num_hits += 1
        return num_hits

    def count_idle(self, hashes: Sequence[BlockHash]) -> int:
        """How many of these resident pieces are idle."""
        return sum(1 for piece in hashes if piece in self._idle)

    def share(self, hashes: Sequence[BlockHash]) -> int:
        """Adds a user to each of these resident pieces; returns how many were idle."""
        num_idle_before = len(self._idle)
        for piece in hashes:
            self._num_users[piece] += 1
            self._idle.pop(piece, None)
        return num_idle_before - len(self._idle)

    def unshare(self, hashes: Sequence[BlockHash]) -> int:
        """Takes a user from each; returns how many became idle."""
        num_idle_before = len(self._idle)
        for piece in reversed(hashes):
            num_users = self._num_users[piece] - 1
            self._num_users[piece] = num_users
            if not num_users:
                self._idle[piece] = None
        return len(self._idle) - num_idle_before

    def publish(self, piece: BlockHash) -> bool:
        """Makes a piece resident with one user; False if its content is resident already."""
        if piece in self._num_users:
            return False
        self._num_users[piece] = 1
        if self.changes is not None:
            self.changes.append((piece, True))
        return True

    def evict_oldest(self) -> None:
        piece = next(iter(self._idle))
        del self._idle[piece]
        del self._num_users[piece]
        if self.changes is not None:
            self.changes.append((piece, False))
