"""Prefilled prompts whose KV waits to be pulled, each under a lease."""

from __future__ import annotations

import heapq

from core.kv_blocks import KvBlocks
from core.sequence_state import SequenceState


class KvPins:
    """Holds the blocks of finished sequences until each is released or its lease ends."""

    __slots__ = ("_blocks", "_lease_ends", "_pinned")

    def __init__(self, blocks: KvBlocks) -> None:
        self._blocks = blocks
        self._pinned: dict[str, tuple[SequenceState, float]] = {}
        # One entry for every lease ever given to a pin; those a renewal or release overtook are
        # skipped when they come up.
        self._lease_ends: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._pinned)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pinned

    def pin(self, seq: SequenceState, lease_end_s: float) -> None:
        """Takes over the blocks the sequence holds."""
        request_id = seq.spec.request_id
        self._pinned[request_id] = seq, lease_end_s
        heapq.heappush(self._lease_ends, (lease_end_s, request_id))

    def renew(self, request_id: str, lease_end_s: float) -> float | None:
        """Moves the end of a lease, never to an earlier time; returns it, None if nothing is pinned."""
        if request_id not in self._pinned:
            return None
        seq, old_end_s = self._pinned[request_id]
        if lease_end_s > old_end_s:
            self.pin(seq, lease_end_s)
        return max(lease_end_s, old_end_s)

    def release(self, request_id: str) -> bool:
        """Frees the blocks; False if nothing is pinned."""
        if request_id not in self._pinned:
            return False
        self._blocks.free(self._pinned.pop(request_id)[0])
        return True

    def expire(self, now_s: float) -> list[str]:
        """Frees what is pinned under leases that have ended; returns whose."""
        expired = []
        while (end_s := self.next_lease_end_s()) is not None and end_s <= now_s:
            request_id = heapq.heappop(self._lease_ends)[1]
            self.release(request_id)
            expired.append(request_id)
        return expired

    def next_lease_end_s(self) -> float | None:
        while self._lease_ends:
            end_s, request_id = self._lease_ends[0]
            if request_id in self._pinned and self._pinned[request_id][1] == end_s:
                return end_s
            heapq.heappop(self._lease_ends)
        return None
