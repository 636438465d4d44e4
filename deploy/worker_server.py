"""A worker's gRPC server: both legs, the feed of its cache, and health."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton_proto import worker_pb2, worker_pb2_grpc
from baton_proto.channel import SERVER_OPTIONS
from core.clock import Clock
from core.errors import StartupError
from decode_workers.lease_keeper import LeaseKeeper
from decode_workers.leg import DecodeLeg
from deploy.settings import WorkerSettings
from engine.base import Engine
from engine.cache_service import CacheFeedService
from engine.gate import Gate
from kv_transfer.handle import KvHandleCodec, KvIdentity
from kv_transfer.peer import KvPeerAddress
from prefill_workers.leg import PrefillLeg, PrefillLegConfig
from telemetry.worker_metrics import WorkerMetrics


@dataclass(frozen=True, slots=True)
class WorkerServer:
    """Runs until it is stopped."""

    address: str
    prefill_leg: PrefillLeg
    decode_leg: DecodeLeg
    _server: grpc.aio.Server

    def hand_back(self, reason: str) -> int:
        """Ends what runs here, for routers to go on with it elsewhere, and keeps no promise of room.

        Returns:
            How many requests that were.
        """
        self.decode_leg.keeps_promises = False
        return self.decode_leg.hand_back(reason) + self.prefill_leg.hand_back()

    async def stop(self, grace: float) -> None:
        """Calls that have not ended after ``grace`` seconds are broken off."""
        await self._server.stop(grace)


async def start_worker_server(
    settings: WorkerSettings,
    host: str,
    engine: Engine,
    peer: KvPeerAddress,
    gate: Gate,
    leases: LeaseKeeper,
    clock: Clock,
    metrics: WorkerMetrics,
) -> WorkerServer:
    """
    Args:
        host: where it listens, on a port that is free.
        peer: where other engines reach this one's KV.

    Raises:
        StartupError: no port is free.
    """
    info = engine.info
    server = grpc.aio.server(options=SERVER_OPTIONS)
    port = server.add_insecure_port(f"{host}:0")
    if not port:
        raise StartupError(f"no free port on {host} for the worker's gRPC server")
    address = f"{host}:{port}"
    identity = KvIdentity(
        model=settings.model,
        revision=settings.weights_id,
        block_size_tokens=info.block_size_tokens,
        kv_layout=info.kv_layout,
    )
    codec = KvHandleCodec(settings.cluster_key, identity)
    leg_config = PrefillLegConfig(address=address, lease_s=settings.lease_s, peer=peer)
    prefill_leg = PrefillLeg(engine, codec, gate, leg_config, metrics)
    worker_pb2_grpc.add_PrefillLegServicer_to_server(prefill_leg, server)
    decode_leg = DecodeLeg(engine, codec, gate, leases, clock, metrics, lease_s=settings.lease_s)
    worker_pb2_grpc.add_DecodeLegServicer_to_server(decode_leg, server)
    worker_pb2_grpc.add_CacheFeedServicer_to_server(
        CacheFeedService(engine.cache_log, info.incarnation), server
    )
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    for service in ("", *(each.full_name for each in worker_pb2.DESCRIPTOR.services_by_name.values())):
        await health_service.set(service, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    return WorkerServer(address, prefill_leg, decode_leg, server)
