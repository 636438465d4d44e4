"""Reads that go on though nobody waits for them any more.

A read cannot be taken back: NIXL gives up its handle, but what was asked for still comes, be it minutes
later, and is written where it was to go. So the request goes on in other blocks, and nobody gets the ones
that are read into until the read has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(slots=True)
class _Read:
    engine_id: str
    handles: list[Any]


class StalledReads:
    """In a worker process: the reads.

    Args:
        has_ended: whether a request's handle has ended; what has is not asked about again.
    """

    def __init__(self, has_ended: Callable[[str, Any], bool]) -> None:
        self._has_ended = has_ended
        self._reads: dict[str, _Read] = {}

    @property
    def engines(self) -> set[str]:
        """From which engines they read."""
        return {read.engine_id for read in self._reads.values()}

    def add(self, request_id: str, engine_id: str, handles: list[Any]) -> None:
        self._reads[request_id] = _Read(engine_id, handles)

    def take_ended(self) -> list[str]:
        """Requests whose reads have ended since they were asked about last."""
        for request_id, read in self._reads.items():
            read.handles = [handle for handle in read.handles if not self._has_ended(request_id, handle)]
        ended = [request_id for request_id, read in self._reads.items() if not read.handles]
        for request_id in ended:
            del self._reads[request_id]
        return ended


class HeldBlocks:
    """In the scheduler: the blocks, which count as used."""

    def __init__(self) -> None:
        self._kv_cache_manager: KVCacheManager | None = None
        self._held: dict[str, list[list[KVCacheBlock]]] = {}
        """By request; an entry for each rank that reads."""

    def __bool__(self) -> bool:
        return bool(self._held)

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        self._kv_cache_manager = kv_cache_manager

    def hold(self, request_id: str) -> None:
        """Keeps a request's blocks from everybody else; to be called before the request gives them up."""
        assert self._kv_cache_manager is not None
        groups = self._kv_cache_manager.get_blocks(request_id).blocks
        blocks = [block for group in groups for block in group]
        self._kv_cache_manager.block_pool.touch(blocks)
        self._held.setdefault(request_id, []).append(blocks)

    def let_go(self, request_id: str) -> None:
        """One rank's read has ended."""
        assert self._kv_cache_manager is not None
        self._kv_cache_manager.block_pool.free_blocks(self._held[request_id].pop())
        if not self._held[request_id]:
            del self._held[request_id]
