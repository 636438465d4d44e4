"""A worker: one engine, two legs and a heartbeat inside one Ray Serve replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Any

import grpc
import ray
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from ray import serve

from baton_proto import worker_pb2, worker_pb2_grpc
from core.clock import MonotonicClock
from core.errors import KvHandleError, StartupError, WorkerLost
from core.types import DesiredState, WorkerReport
from decode_workers.lease_keeper import LeaseKeeper
from decode_workers.leg import DecodeLeg
from deploy.engines import start_engine
from deploy.node import node_host
from deploy.settings import WorkerSettings
from engine.cache_service import CacheFeedService
from engine.gate import Gate
from kv_transfer.handle import KvHandleCodec, KvIdentity
from kv_transfer.peer import KvPeerAddress
from prefill_workers.leg import PrefillLeg, PrefillLegConfig
from telemetry.exporter import MetricsEndpoint, new_registry, start_exporter
from telemetry.logs import configure_logging, fields
from telemetry.worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)

_ENGINE_WATCH_S = 0.25
_PULL_WATCH_S = 0.05
_MIN_CALL_S = 1.0
_QUEUE_FACTOR = 4
"""A worker holds at most this many times the engine's batch, queued requests included."""
_GRPC_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class WorkerReplica:
    """Deployed once a shape.

    Args:
        settings: this shape's.
        registry: handle of the registry deployment.
    """

    async def __init__(self, settings: WorkerSettings, registry: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        started_s = time.monotonic()
        self._settings = settings
        self._registry = registry
        self._worker_id = f"{settings.shape}-{serve.get_replica_context().replica_id.unique_id}"
        self._host = node_host(settings.bind_host)
        self._node_id = ray.get_runtime_context().get_node_id()
        self._role = min(settings.allowed_roles)
        self._role_assigned = False
        self._num_expired_leases = 0
        self._num_heartbeats = 0
        self._met_peers: set[str] = set()
        self._meeting: asyncio.Task[None] | None = None
        configure_logging(self._worker_id)
        self._engine, peer = await start_engine(settings, self._host)
        self._gate = Gate(_QUEUE_FACTOR * self._engine.info.max_num_seqs)
        clock = MonotonicClock()
        self._leases = LeaseKeeper(clock)
        metrics_registry = new_registry()
        self._metrics = WorkerMetrics(
            metrics_registry, model=settings.model, shape=settings.shape, worker_id=self._worker_id
        )
        self._exporter: MetricsEndpoint = start_exporter(self._host, metrics_registry)
        self._server, self._address = await self._start_server(clock, peer)
        self._report_startup(time.monotonic() - started_s)
        self._tasks = [
            asyncio.create_task(self._beat(), name="heartbeat"),
            asyncio.create_task(self._watch_engine(), name="engine watch"),
        ]

    # Start.

    async def _start_server(self, clock: MonotonicClock, peer: KvPeerAddress) -> tuple[grpc.aio.Server, str]:
        settings, info = self._settings, self._engine.info
        server = grpc.aio.server(options=_GRPC_OPTIONS)
        port = server.add_insecure_port(f"{self._host}:0")
        if not port:
            raise StartupError(f"no free port on {self._host} for the worker's gRPC server")
        address = f"{self._host}:{port}"
        codec = KvHandleCodec(
            settings.cluster_key,
            KvIdentity(
                model=settings.model,
                revision=settings.weights_id,
                block_size_tokens=info.block_size_tokens,
                kv_layout=info.kv_layout,
            ),
        )
        leg_config = PrefillLegConfig(address=address, lease_s=settings.lease_s, peer=peer)
        worker_pb2_grpc.add_PrefillLegServicer_to_server(
            PrefillLeg(self._engine, codec, self._gate, leg_config, self._metrics), server
        )
        worker_pb2_grpc.add_DecodeLegServicer_to_server(
            DecodeLeg(
                self._engine, codec, self._gate, self._leases, clock, self._metrics, lease_s=settings.lease_s
            ),
            server,
        )
        worker_pb2_grpc.add_CacheFeedServicer_to_server(
            CacheFeedService(self._engine.cache_log, info.incarnation), server
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        for service in worker_pb2.DESCRIPTOR.services_by_name.values():
            await self._health.set(service.full_name, health_pb2.HealthCheckResponse.SERVING)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        return server, address

    def _report_startup(self, total_s: float) -> None:
        info = self._engine.info
        phases = {**info.startup_s, "total": round(total_s, 3)}
        self._metrics.set_startup(phases)
        self._metrics.set_capacity(info.num_kv_blocks)
        self._metrics.set_role(self._role)
        logger.info(
            "worker ready",
            extra=fields(
                address=self._address,
                metrics=self._exporter.address,
                kv_blocks=info.num_kv_blocks,
                block_size_tokens=info.block_size_tokens,
                **{f"{phase}_s": seconds for phase, seconds in phases.items()},
            ),
        )

    # Membership.

    async def _beat(self) -> None:
        """The registry keeps a report for a period unless it wants something else, and answers then."""
        period_s = self._settings.heartbeat_s
        while True:
            sent_at_s = time.monotonic()
            try:
                desired = await asyncio.wait_for(
                    self._registry.heartbeat.remote(self._report(), period_s),
                    period_s + max(period_s, _MIN_CALL_S),
                )
                if self._apply(desired):
                    continue
            except Exception as error:
                logger.warning("no answer from the registry", extra=fields(error=repr(error)))
            await asyncio.sleep(max(0.0, period_s - (time.monotonic() - sent_at_s)))

    def _report(self) -> WorkerReport:
        settings, info, load = self._settings, self._engine.info, self._engine.load()
        self._metrics.set_load(load)
        self._metrics.leases_expired(load.num_expired_leases - self._num_expired_leases)
        self._num_expired_leases = load.num_expired_leases
        self._num_heartbeats += 1
        return WorkerReport(
            worker_id=self._worker_id,
            incarnation=info.incarnation,
            model=settings.model,
            revision=settings.weights_id,
            shape=settings.shape,
            allowed_roles=settings.allowed_roles,
            role=self._role,
            role_assigned=self._role_assigned,
            draining=self._gate.draining,
            address=self._address,
            node_id=self._node_id,
            metrics_address=self._exporter.address,
            block_size_tokens=info.block_size_tokens,
            num_kv_blocks=info.num_kv_blocks,
            bytes_per_block=info.bytes_per_block,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            load=load,
            heartbeat=self._num_heartbeats,
            steps=self._engine.take_steps(),
        )

    def _apply(self, desired: DesiredState) -> bool:
        """Takes the role it is told; what runs here goes on as it is.

        Returns:
            Whether there is something to report at once.
        """
        if self._meeting is None or self._meeting.done():  # never in the heartbeat's way
            self._meeting = asyncio.create_task(self._meet(desired), name="meet peers")
        if desired.role is self._role and self._role_assigned:
            return False
        logger.info("role", extra=fields(role=desired.role.value))
        self._role, self._role_assigned = desired.role, True
        self._engine.take_steps()  # of the role it had
        self._metrics.set_role(self._role)
        return True

    async def _meet(self, desired: DesiredState) -> None:
        """Connects to new peers, so that the first handoff does not wait for it; forgets those that left."""
        self._leases.keep_only({peer.address for peer in desired.peers})
        known = {peer.incarnation for peer in desired.peers}
        if departed := self._met_peers - known:
            self._met_peers &= known
            with contextlib.suppress(WorkerLost):  # a dead engine keeps nothing
                await self._engine.disconnect_kv(sorted(departed))
        for peer in desired.peers:
            if peer.incarnation in self._met_peers:
                continue
            try:
                kv_peer = await self._leases.meet(peer.address, peer.incarnation)
                await self._engine.connect_kv(kv_peer.as_params())
                self._met_peers.add(peer.incarnation)
            except (KvHandleError, WorkerLost) as error:
                logger.info("peer not met yet", extra=fields(peer=peer.address, error=str(error)))

    # End.

    async def _watch_engine(self) -> None:
        """A dead engine leaves the cluster at once; Ray Serve replaces the replica."""
        while not self._engine.dead:  # noqa: ASYNC110  the engine has no event to wait for
            await asyncio.sleep(_ENGINE_WATCH_S)
        logger.error("the engine died; leaving the cluster")
        self._tasks[0].cancel()
        await self._server.stop(grace=0)
        await self._leave()

    async def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            RuntimeError: the engine is dead; the replica has to be replaced.
        """
        if self._engine.dead:
            raise RuntimeError("the engine died")
        if self._tasks[0].done():
            raise RuntimeError("the heartbeat ended")

    async def _leave(self) -> None:
        try:
            await asyncio.wait_for(
                self._registry.leave.remote(self._worker_id, self._engine.info.incarnation), 2.0
            )
        except Exception as error:
            logger.info("left without a word", extra=fields(error=repr(error)))

    async def _wait_for_pulls(self) -> None:
        """Prompts prefilled here are still being pulled, for at most their lease."""
        give_up_at_s = time.monotonic() + self._settings.lease_s
        while self._engine.load().num_pinned and time.monotonic() < give_up_at_s:  # noqa: ASYNC110
            await asyncio.sleep(_PULL_WATCH_S)

    async def __del__(self) -> None:
        """Ray Serve's shutdown hook: finish what is here, take nothing new, go."""
        if not hasattr(self, "_tasks"):
            return
        self._gate.draining = True
        self._metrics.set_draining(True)
        if not self._engine.dead:
            try:
                await asyncio.wait_for(self._registry.heartbeat.remote(self._report()), 2.0)
            except Exception as error:
                logger.info("draining unannounced", extra=fields(error=repr(error)))
            if not await self._gate.drain(self._settings.drain_timeout_s):
                logger.warning("drain timed out", extra=fields(requests=self._gate.num_inside))
            await self._wait_for_pulls()
        for task in (*self._tasks, self._meeting):
            if task is not None:
                task.cancel()
        await self._leave()
        await self._server.stop(grace=1.0)
        await self._leases.close()
        await self._engine.shutdown(timeout_s=5.0)
        self._exporter.stop()
        logger.info("worker stopped", extra=fields(pid=os.getpid()))
