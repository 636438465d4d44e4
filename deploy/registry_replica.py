"""The registry in a Ray Serve replica: heartbeats, snapshots by long poll, metrics endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from dataclasses import replace

from core.clock import MonotonicClock
from core.traffic import TrafficSummary
from core.types import DesiredState, Role, Snapshot, WorkerReport
from deploy.node import node_host
from planner.observation import Observation
from planner.registry import Registry, RegistryConfig
from telemetry.exporter import ScrapeTarget, http_sd, new_registry, start_exporter, worker_targets
from telemetry.logs import configure_logging, fields
from telemetry.registry_metrics import RegistryMetrics

logger = logging.getLogger(__name__)

_ROUTER_TTL_S = 30.0
_ROUTER_AWAY_S = 5.0
"""A router asks at least once a second."""
_PLANNER_TTL_S = 30.0


class RegistryReplica:
    """Deployed once."""

    def __init__(self, config: RegistryConfig, bind_host: str | None) -> None:
        configure_logging("registry")
        self._heartbeat_s = config.heartbeat_s
        self._registry = Registry(config, MonotonicClock(), uuid.uuid4().hex)
        self._changed = asyncio.Condition()
        self._routers: dict[str, tuple[str, float]] = {}
        self._planner = ("", 0.0)
        """Its metrics address, and when it last asked."""
        registry = new_registry()
        self._metrics = RegistryMetrics(registry)
        self._seen: dict[str, WorkerReport] = {}
        self._counted_epoch = 0
        self._exporter = start_exporter(node_host(bind_host), registry)

    def reconfigure(self, split: dict[str, dict[str, int]]) -> None:
        """Called by Ray Serve at the start, and when the configuration's counts have changed.

        Args:
            split: shape to number of workers by role.
        """
        self._registry.use_split(
            {shape: {Role(role): count for role, count in roles.items()} for shape, roles in split.items()}
        )

    async def heartbeat(self, report: WorkerReport, wait_s: float = 0.0) -> DesiredState:
        """Takes a worker's report; the answer is what it should do.

        Args:
            wait_s: how long the answer may wait for something to change.
        """
        self._metrics.heartbeat(report.model)
        before = self._registry.epoch
        self._registry.heartbeat(report)
        await self._wake(before)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: self._registry.is_to_change(report))
        return self._registry.desired_state(report)

    async def leave(self, worker_id: str, incarnation: str, died_of: str = "") -> float:
        """A worker says goodbye: it need not be waited for. See :meth:`planner.registry.Registry.leave`."""
        before = self._registry.epoch
        delay_s = self._registry.leave(worker_id, incarnation, died_of)
        await self._wake(before, left=worker_id, died=bool(died_of))
        return delay_s

    async def start_failed(self, shape: str, node_id: str, reason: str) -> float:
        """See :meth:`planner.registry.Registry.start_failed`."""
        return self._registry.start_failed(shape, node_id, reason)

    async def assign_role(self, worker_id: str, role: Role) -> None:
        """Sets a worker's desired role and tells it at once, by the answer to the heartbeat that is open.

        Raises:
            ValueError: no such worker, or its shape may not take the role.
        """
        self._registry.assign_role(worker_id, role)
        async with self._changed:
            self._changed.notify_all()

    async def observe(self, metrics_address: str) -> Observation:
        """The cluster, for the planner.

        Args:
            metrics_address: the planner's.
        """
        self._planner = (metrics_address, time.monotonic())
        return self._registry.observe()

    async def snapshot(
        self,
        traffic: TrafficSummary,
        metrics_address: str,
        known: tuple[str, int] | None,
        wait_s: float,
    ) -> Snapshot | None:
        """The cluster, as soon as it is not the one the router knows, or after ``wait_s``.

        Args:
            traffic: the router's, for the planner.
            known: (incarnation, epoch) of the router's last snapshot.

        Returns:
            None while the registry is rebuilding after a start.
        """
        before = self._registry.epoch
        self._registry.router_heard(traffic)
        await self._wake(before)
        self._routers[traffic.router_id] = (metrics_address, time.monotonic())
        until_s = time.monotonic() + wait_s
        while True:
            snapshot = self._registry.snapshot()
            self._count_changes()
            left_s = until_s - time.monotonic()
            if left_s <= 0 or (snapshot and (snapshot.incarnation, snapshot.epoch) != known):
                break
            async with self._changed:
                # Silence changes the membership too, so look again before long.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(left_s, self._heartbeat_s))
        self._metrics.set_publishing(snapshot is not None)
        if snapshot is not None:
            self._metrics.snapshot_served()
            self._metrics.set_snapshot(snapshot)
            snapshot = replace(snapshot, num_routers=len(self._routers_since(_ROUTER_AWAY_S)))
        return snapshot

    async def metrics_targets(self) -> list[dict[str, object]]:
        """Every process's metrics endpoint, as Prometheus's HTTP service discovery wants it."""
        targets = [ScrapeTarget(address=self._exporter.address, labels={"process": "registry"})]
        targets += [
            ScrapeTarget(address=address, labels={"process": "router"})
            for address in self._routers_since(_ROUTER_TTL_S)
        ]
        planner_address, asked_at_s = self._planner
        if planner_address and time.monotonic() - asked_at_s < _PLANNER_TTL_S:
            targets.append(ScrapeTarget(address=planner_address, labels={"process": "planner"}))
        snapshot = self._registry.snapshot()
        if snapshot is not None:
            targets += worker_targets(snapshot)
        return http_sd(targets)

    def _routers_since(self, age_s: float) -> list[str]:
        """Metrics addresses of the routers that asked for a snapshot in the last seconds."""
        oldest_s = time.monotonic() - age_s
        return [address for address, seen_at_s in self._routers.values() if seen_at_s > oldest_s]

    async def _wake(self, epoch_before: int, left: str | None = None, *, died: bool = False) -> None:
        self._count_changes(left, died=died)
        if self._registry.epoch != epoch_before:
            async with self._changed:
                self._changed.notify_all()

    def _count_changes(self, left: str | None = None, *, died: bool = False) -> None:
        """Counts who dropped out, who changed roles and who was quarantined since the last look.

        Args:
            left: the worker that has just said goodbye, if one has.
            died: it did so because its engine has died.
        """
        if self._registry.epoch == self._counted_epoch:
            return
        self._counted_epoch = self._registry.epoch
        members = self._registry.members()
        for worker_id, before in self._seen.items():
            now = members.get(worker_id)
            if now is None:
                reason = "silent" if worker_id != left else "died" if died else "left"
                self._metrics.worker_dropped(before.model, reason)
            elif before.role_assigned and now.role is not before.role:
                self._metrics.role_switched(now.model, before.role, now.role)
        for worker_id, now in members.items():
            known = self._seen.get(worker_id)
            if now.trouble and not (known and known.trouble and known.incarnation == now.incarnation):
                self._metrics.worker_quarantined(now.model)
                logger.warning("worker quarantined", extra=fields(worker=worker_id, reason=now.trouble))
        self._seen = members
