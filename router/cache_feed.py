"""One router's view of what one worker has cached: follows the worker's feed and keeps an index right."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import grpc
import numpy as np
import numpy.typing as npt

from baton_proto import worker_pb2, worker_pb2_grpc
from telemetry.logs import fields

logger = logging.getLogger(__name__)

_RECONNECT_S = 0.2
_MAX_RECONNECT_S = 2.0

States = npt.NDArray[np.uint64]
"""Names of blocks as ``core.prompt_blocks`` makes them; read-only, no state twice, in no order."""


class CacheIndex(Protocol):
    """Who keeps what the feeds say. Called on the event loop, so it has to be quick."""

    def replace(self, incarnation: str, states: States) -> None:
        """These blocks, and no others, are cached at this engine start."""
        ...

    def store(self, incarnation: str, states: States) -> None: ...

    def evict(self, incarnation: str, states: States) -> None: ...


class CacheFeed:
    """The feed of one engine start; make it on the event loop that it is to run on.

    When the stream breaks, the index keeps what it has and ``flowing`` is False until the feed goes on,
    from the changes missed in between or from a snapshot.

    Args:
        channel: to the worker; the caller closes it, after the feed.
        incarnation: the engine start; the worker refuses to speak for another one.
        router_id: for the worker's log.
    """

    def __init__(
        self, channel: grpc.aio.Channel, index: CacheIndex, incarnation: str, router_id: str
    ) -> None:
        self._stub = worker_pb2_grpc.CacheFeedStub(channel)
        self._index = index
        self._incarnation = incarnation
        self._router_id = router_id
        self._seq: int | None = None
        self.flowing = False
        """True while the index says of the worker what is so, but for the last moments."""
        self.num_resets = 0
        """Snapshots taken, the first one included."""
        self._task = asyncio.create_task(self._follow(), name=f"cache of {incarnation}")

    async def close(self) -> None:
        """Ends the feed; the index keeps what it has."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.flowing = False

    async def _follow(self) -> None:
        backoff_s = _RECONNECT_S
        while True:
            try:
                await self._read()
                reason = "the worker ended the stream"
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    logger.info("no cache feed", extra=fields(incarnation=self._incarnation))
                    return
                reason = f"{error.code().name}: {error.details()}"
            except Exception as error:
                logger.exception(
                    "the cache feed could not be read", extra=fields(incarnation=self._incarnation)
                )
                self._seq = None
                reason = repr(error)
            backoff_s = _RECONNECT_S if self.flowing else min(2 * backoff_s, _MAX_RECONNECT_S)
            self.flowing = False
            logger.info("cache feed broken", extra=fields(incarnation=self._incarnation, reason=reason))
            await asyncio.sleep(backoff_s)

    async def _read(self) -> None:
        """Takes one stream's deltas until it ends, or one of them does not follow the one before."""
        stream = self._stub.WatchCache(
            worker_pb2.WatchCacheRequest(
                router_id=self._router_id, incarnation=self._incarnation, known_seq=self._seq
            )
        )
        try:
            async for delta in stream:
                if not delta.reset and delta.after_seq != self._seq:
                    raise ValueError(f"a delta after {delta.after_seq}, but {self._seq} is known")
                self._take(delta)
        finally:
            stream.cancel()

    def _take(self, delta: worker_pb2.CacheDelta) -> None:
        stored, removed = _unpacked(delta.stored), _unpacked(delta.removed)
        self._seq = None  # until the index has all of it
        if delta.reset:
            self._index.replace(self._incarnation, stored)
            self.num_resets += 1
        else:
            if removed.size:
                self._index.evict(self._incarnation, removed)
            if stored.size:
                self._index.store(self._incarnation, stored)
        self._seq = delta.seq
        self.flowing = True


def _unpacked(data: bytes) -> States:
    """
    Raises:
        ValueError: ``data`` is not a whole number of states.
    """
    return np.frombuffer(data, dtype="<u8").astype(np.uint64, copy=False)
