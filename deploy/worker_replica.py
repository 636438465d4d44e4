"""A worker: one engine, two legs and a heartbeat inside one Ray Serve replica."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from typing import Any

import ray
from ray import serve

from core.clock import MonotonicClock
from core.errors import StartupError
from core.garbage import no_collection
from core.types import DesiredState, WorkerReport
from decode_workers.lease_keeper import LeaseKeeper
from decode_workers.peer_connections import PeerConnections
from deploy.engine_watch import watch_engine
from deploy.engines import start_engine
from deploy.hang_watch import HangWatch
from deploy.node import node_host
from deploy.serve_log import keep_serve_log
from deploy.settings import WorkerSettings
from deploy.worker_server import start_worker_server
from engine.base import Engine
from engine.gate import Gate
from kv_transfer.peer import KvPeerAddress
from telemetry.exporter import MetricsEndpoint, new_registry, start_exporter
from telemetry.logs import configure_logging, fields
from telemetry.worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)

_TELL_TIMEOUT_S = 2.0
_PULL_WATCH_S = 0.05
_MIN_CALL_S = 1.0
_QUEUE_FACTOR = 4
"""A worker holds at most this many times the engine's batch, queued requests included."""


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
        self._announcing: asyncio.Task[None] | None = None
        self._leaving = False
        """It was told to go."""
        self._given_up = False
        """It has handed back what it had, and takes nothing."""
        self._hang = HangWatch(settings.hang_timeout_s)
        self._quarantined = ""
        """Why the registry wants it replaced; empty if it does not."""
        self._replace_at_s = math.inf
        """When a worker whose engine has died says so to Ray Serve."""
        configure_logging(self._worker_id)
        keep_serve_log()
        with no_collection():  # most of it is imports, of which they are a sixth
            self._engine, peer = await self._start_engine()
        self._gate = Gate(_QUEUE_FACTOR * self._engine.info.max_num_seqs)
        clock = MonotonicClock()
        self._leases = LeaseKeeper(clock)
        self._peers = PeerConnections(self._engine, self._leases)
        metrics_registry = new_registry()
        self._metrics = WorkerMetrics(
            metrics_registry, model=settings.model, shape=settings.shape, worker_id=self._worker_id
        )
        self._exporter: MetricsEndpoint = start_exporter(self._host, metrics_registry)
        self._server = await start_worker_server(
            settings, self._host, self._engine, peer, self._gate, self._leases, clock, self._metrics
        )
        self._report_startup(time.monotonic() - started_s)
        self._tasks = [
            asyncio.create_task(self._beat(), name="heartbeat"),
            asyncio.create_task(self._watch_engine(), name="engine watch"),
        ]

    # Start.

    async def _start_engine(self) -> tuple[Engine, KvPeerAddress]:
        try:
            return await start_engine(self._settings, self._host)
        except StartupError as error:
            # Ray Serve tries again at once, and without end where the deployment has ever run.
            delay_s = await self._tell("start_failed", self._settings.shape, self._node_id, str(error))
            await asyncio.sleep(delay_s or 0.0)
            raise

    def _report_startup(self, total_s: float) -> None:
        info = self._engine.info
        phases = {**info.startup_s, "total": round(total_s, 3)}
        self._metrics.set_startup(phases)
        self._metrics.set_capacity(info.num_kv_blocks)
        self._metrics.set_role(self._role)
        logger.info(
            "worker ready",
            extra=fields(
                address=self._server.address,
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
            address=self._server.address,
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
            trouble=self._trouble,
        )

    def _apply(self, desired: DesiredState) -> bool:
        """Takes the role it is told; what runs here goes on as it is.

        Returns:
            Whether there is something to report at once.
        """
        if desired.quarantined and not self._quarantined:
            self._quarantined = desired.quarantined
            self._give_up()
            return True
        self._peers.keep(desired.peers)
        if desired.role is self._role and self._role_assigned:
            return False
        logger.info("role", extra=fields(role=desired.role.value))
        self._role, self._role_assigned = desired.role, True
        self._engine.take_steps()  # of the role it had
        self._metrics.set_role(self._role)
        return True

    # Trouble.

    @property
    def _trouble(self) -> str:
        """Why nothing should be sent here; empty if all is well."""
        if self._quarantined or not self._hang.hung:
            return self._quarantined
        return f"its engine has not answered for {self._settings.hang_timeout_s:g} s"

    async def _watch_engine(self) -> None:
        """A dead engine leaves the cluster at once; Ray Serve replaces the replica."""
        await watch_engine(self._engine, self._hang, self._note_hang)
        logger.error("the engine died; leaving the cluster")
        self._tasks[0].cancel()
        leaving = asyncio.create_task(self._leave("its engine died"), name="leave")
        await self._server.stop(grace=0)
        self._replace_at_s = time.monotonic() + await leaving

    def _note_hang(self) -> None:
        """Gives up when the engine hangs, and takes requests again when it answers."""
        if self._hang.hung and not self._given_up:
            self._give_up()
        elif self._given_up and not self._trouble:
            logger.warning("the engine answers again")
            self._given_up = False
            self._gate.draining, self._server.decode_leg.keeps_promises = self._leaving, not self._leaving
            self._metrics.set_draining(self._leaving)
            self._announcing = asyncio.create_task(self._announce(), name="announce")

    def _give_up(self) -> None:
        """Takes nothing new and gives back what runs here."""
        self._given_up = self._gate.draining = True
        self._metrics.set_draining(True)
        num_requests = self._server.hand_back(self._trouble)
        logger.error("quarantined", extra=fields(reason=self._trouble, requests_handed_back=num_requests))
        self._announcing = asyncio.create_task(self._announce(), name="announce")

    async def _announce(self) -> None:
        """A heartbeat out of turn."""
        await self._tell("heartbeat", self._report())

    # End.

    async def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            RuntimeError: the replica has to be replaced.
        """
        if self._engine.dead:
            if time.monotonic() < self._replace_at_s:  # those before it died early, too
                return
            raise RuntimeError("the engine died")
        if self._quarantined or self._hang.lost:
            raise RuntimeError(self._trouble)
        if any(task.done() for task in self._tasks):
            raise RuntimeError("the heartbeat or the engine watch ended")

    async def _leave(self, died_of: str = "") -> float:
        """See :meth:`planner.registry.Registry.leave`."""
        return await self._tell("leave", self._worker_id, self._engine.info.incarnation, died_of) or 0.0

    async def _tell(self, method: str, *arguments: Any) -> Any:
        """Calls the registry; it may be away, which must not keep anybody here.

        Returns:
            Its answer, None without one.
        """
        try:
            return await asyncio.wait_for(getattr(self._registry, method).remote(*arguments), _TELL_TIMEOUT_S)
        except Exception as error:
            logger.info("the registry was not told", extra=fields(what=method, error=repr(error)))
            return None

    async def _wait_for_pulls(self) -> None:
        """Prompts prefilled here are still being pulled, for at most their lease."""
        give_up_at_s = time.monotonic() + self._settings.lease_s
        while self._engine.load().num_pinned and time.monotonic() < give_up_at_s:  # noqa: ASYNC110
            await asyncio.sleep(_PULL_WATCH_S)

    async def __del__(self) -> None:
        """Ray Serve's shutdown hook: finish what is here, take nothing new, go."""
        if not hasattr(self, "_tasks"):
            return
        self._leaving = self._gate.draining = True
        self._metrics.set_draining(True)
        if not (self._engine.dead or self._trouble):
            await self._announce()
            if not await self._gate.drain(self._settings.drain_timeout_s):
                num_requests = self._server.hand_back("the worker has drained for as long as it may")
                logger.warning("drain timed out", extra=fields(requests_handed_back=num_requests))
            await self._wait_for_pulls()
        self._peers.stop()
        for task in (*self._tasks, self._announcing):
            if task is not None:
                task.cancel()
        await self._leave(self._trouble)
        await self._server.stop(grace=1.0)
        await self._leases.close()
        await self._engine.shutdown(timeout_s=5.0)
        self._exporter.stop()
        logger.info("worker stopped", extra=fields(pid=os.getpid()))
