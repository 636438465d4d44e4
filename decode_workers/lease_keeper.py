"""Leases seen from the puller: deadlines on this node's clock, and their renewal."""

from __future__ import annotations

import asyncio

import grpc

from baton_proto import worker_pb2, worker_pb2_grpc
from core.clock import Clock
from core.errors import KvHandleError
from kv_transfer.handle import KvHandle
from kv_transfer.lease import ClockAnchor, ClockAnchors
from kv_transfer.peer import KvPeerAddress

_CALL_TIMEOUT_S = 2.0


class LeaseKeeper:
    """Talks to the prefill workers whose KV this worker pulls."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._anchors = ClockAnchors()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def deadline_s(self, handle: KvHandle) -> float:
        """Until when the handle's blocks may be trusted, on this node's clock.

        Raises:
            KvHandleError: ``peer_unreachable`` or ``stale``.
        """
        anchor = self._anchors.fresh(handle.incarnation, self._clock.now_s())
        if anchor is not None:
            return anchor.deadline_s(handle.expires_at_s)
        anchor, _ = await self._ask(handle.address, handle.incarnation, [])
        return anchor.deadline_s(handle.expires_at_s)

    async def renew(self, handle: KvHandle) -> float:
        """Extends the lease; the new deadline on this node's clock.

        Raises:
            KvHandleError: ``peer_unreachable``, ``stale`` or ``lease_over``.
        """
        anchor, reply = await self._ask(handle.address, handle.incarnation, [handle.engine_request_id])
        expires_at_s = reply.expires_at_s.get(handle.engine_request_id)
        if expires_at_s is None:
            raise KvHandleError("lease_over", "the prefill worker holds these blocks no longer")
        return anchor.deadline_s(expires_at_s)

    async def meet(self, address: str, incarnation: str) -> KvPeerAddress:
        """Reads a peer's clock and learns where its KV side channel listens.

        Raises:
            KvHandleError: ``peer_unreachable`` or ``stale``.
        """
        _, reply = await self._ask(address, incarnation, [])
        return KvPeerAddress.decode(reply.connector_peer)

    async def _ask(
        self, address: str, incarnation: str, engine_request_ids: list[str]
    ) -> tuple[ClockAnchor, worker_pb2.RenewLeasesReply]:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address)
        sent_at_s = self._clock.now_s()
        try:
            reply = await worker_pb2_grpc.PrefillLegStub(channel).RenewLeases(
                worker_pb2.RenewLeasesRequest(engine_request_ids=engine_request_ids),
                timeout=_CALL_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            raise KvHandleError("peer_unreachable", f"prefill worker {address}: {error.code()}") from error
        except (asyncio.CancelledError, grpc.aio.UsageError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise KvHandleError("peer_unreachable", f"prefill worker {address} left the cluster") from None
        if reply.incarnation != incarnation:
            raise KvHandleError("stale", f"prefill worker {address} has been restarted")
        anchor = ClockAnchor(sent_at_s, reply.now_s)
        self._anchors.set(incarnation, anchor)
        return anchor, reply

    def keep_only(self, addresses: set[str]) -> None:
        """Drops channels to peers that left the cluster, once the calls on them have had their time."""
        for address in set(self._channels) - addresses:
            closing = asyncio.create_task(self._channels.pop(address).close(grace=_CALL_TIMEOUT_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self.keep_only(set())
        await asyncio.gather(*self._closing)
