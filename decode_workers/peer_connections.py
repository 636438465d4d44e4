"""Connects a worker's engine to its peers, so that the first handoff does not wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from core.errors import KvHandleError, WorkerLost
from core.types import KvPeer
from decode_workers.lease_keeper import LeaseKeeper
from engine.base import Engine
from telemetry.logs import fields

logger = logging.getLogger(__name__)


class PeerConnections:
    """One worker's."""

    def __init__(self, engine: Engine, leases: LeaseKeeper) -> None:
        self._engine = engine
        self._leases = leases
        self._met: set[str] = set()
        self._meeting: asyncio.Task[None] | None = None

    def keep(self, peers: Sequence[KvPeer]) -> None:
        """Meets new peers and forgets those that left, in the background.

        While that is under way a call does nothing: one comes with every heartbeat.
        """
        if self._meeting is None or self._meeting.done():
            self._meeting = asyncio.create_task(self._meet(peers), name="meet peers")

    def stop(self) -> None:
        if self._meeting is not None:
            self._meeting.cancel()

    async def _meet(self, peers: Sequence[KvPeer]) -> None:
        self._leases.keep_only({peer.address for peer in peers})
        known = {peer.incarnation for peer in peers}
        if departed := self._met - known:
            self._met &= known
            with contextlib.suppress(WorkerLost):  # a dead engine keeps nothing
                await self._engine.disconnect_kv(sorted(departed))
        for peer in peers:
            if peer.incarnation in self._met:
                continue
            try:
                kv_peer = await self._leases.meet(peer.address, peer.incarnation)
                await self._engine.connect_kv(kv_peer.as_params())
                self._met.add(peer.incarnation)
            except (KvHandleError, WorkerLost) as error:
                logger.info("peer not met yet", extra=fields(peer=peer.address, error=str(error)))
