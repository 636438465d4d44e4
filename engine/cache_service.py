"""Tells routers what the engine has cached: one gRPC stream per router, whatever the worker's role."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc

from baton_proto import worker_pb2, worker_pb2_grpc
from engine.cache_log import CacheLog
from telemetry.logs import fields

logger = logging.getLogger(__name__)

_GATHER_S = 0.03


class CacheFeedService(worker_pb2_grpc.CacheFeedServicer):
    """gRPC service over an engine's cache log.

    Nothing is queued for a router: each delta is made when the one before has left, and a router that
    reads slowly gets larger ones, or a snapshot.

    Args:
        log: None if the engine cannot tell; routers are answered UNIMPLEMENTED then.
        incarnation: of the engine start that the log belongs to.
        gather_s: how long changes are gathered into one delta.
    """

    def __init__(self, log: CacheLog | None, incarnation: str, *, gather_s: float = _GATHER_S) -> None:
        self._log = log
        self._incarnation = incarnation
        self._gather_s = gather_s

    async def WatchCache(
        self, message: worker_pb2.WatchCacheRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.CacheDelta]:
        log = self._log
        if log is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this engine does not tell what it has cached")
        if message.incarnation != self._incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another engine start")
        logger.info("a router watches the cache", extra=fields(router_id=message.router_id))
        seq = message.known_seq if message.HasField("known_seq") else None
        changed = asyncio.Event()
        unlisten = log.listen(changed.set)
        try:
            while True:
                changed.clear()
                news = log.since(seq)
                seq = news.seq
                yield worker_pb2.CacheDelta(
                    after_seq=news.after_seq,
                    seq=seq,
                    reset=news.reset,
                    stored=news.stored,
                    removed=news.removed,
                )
                await changed.wait()
                await asyncio.sleep(self._gather_s)
        finally:
            unlisten()
