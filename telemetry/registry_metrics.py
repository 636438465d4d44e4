"""What the registry measures: who is there, who left, and how often roles change."""

from __future__ import annotations

from itertools import permutations

from prometheus_client import CollectorRegistry

from core.types import Role, Snapshot
from telemetry.catalog import Catalog
from telemetry.worker_counts import WorkerCounts


class RegistryMetrics:
    """The metrics of the registry process. All methods are called from its event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.catalog = catalog = Catalog(registry)
        self._workers = WorkerCounts(
            catalog.gauge(
                "baton_registry_workers",
                "workers",
                "Workers the registry knows, by role (prefill, decode) and state (active, draining, "
                "quarantined).",
                ("model", "role", "state"),
            )
        )
        self._epoch = catalog.gauge(
            "baton_registry_epoch", "epochs", "Epoch of the membership; starts again with the registry."
        )
        self._publishing = catalog.gauge(
            "baton_registry_publishing",
            "0 or 1",
            "0 while a restarted registry still waits for heartbeats before it publishes.",
        )
        self._heartbeats = catalog.counter(
            "baton_registry_heartbeats_total", "heartbeats", "Heartbeats received.", ("model",)
        )
        self._snapshots = catalog.counter(
            "baton_registry_snapshots_total", "snapshots", "Snapshots handed to routers."
        )
        self._dropped = catalog.counter(
            "baton_registry_dropped_workers_total",
            "workers",
            "Workers dropped, by reason (silent: no heartbeat in time; left: it was told to go; died: its "
            "engine died, or it had to be replaced).",
            ("model", "reason"),
        )
        self._quarantined = catalog.counter(
            "baton_registry_quarantined_workers_total",
            "workers",
            "Workers that got nothing new because routers saw them fail or their engine did not answer.",
            ("model",),
        )
        self._suspect_nodes = catalog.gauge(
            "baton_registry_suspect_nodes",
            "nodes",
            "Nodes on which workers of one shape keep dying, counted once for each such shape.",
        )
        self._role_switches = catalog.counter(
            "baton_registry_role_switches_total",
            "switches",
            "Workers whose reported role changed.",
            ("model", "from_role", "to_role"),
        )

    def set_snapshot(self, snapshot: Snapshot) -> None:
        """The membership as it is now; call after every change."""
        self._workers.set(snapshot)
        self._epoch.set(snapshot.epoch)
        self._suspect_nodes.set(len(snapshot.suspect_nodes))
        for model in {worker.model for worker in snapshot.workers}:
            # From zero, so that the first switch is already an increase that Prometheus sees.
            for from_role, to_role in permutations(Role, 2):
                self._role_switches.labels(model, from_role, to_role)
            self._quarantined.labels(model)

    def set_publishing(self, publishing: bool) -> None:
        """Whether routers get snapshots."""
        self._publishing.set(publishing)

    def heartbeat(self, model: str) -> None:
        """A worker of this model reported."""
        self._heartbeats.labels(model).inc()

    def snapshot_served(self) -> None:
        """A router got a snapshot."""
        self._snapshots.inc()

    def worker_dropped(self, model: str, reason: str) -> None:
        """A worker is gone: ``silent``, ``left`` or ``died``."""
        self._dropped.labels(model, reason).inc()

    def worker_quarantined(self, model: str) -> None:
        """A worker is there and gets nothing new any more."""
        self._quarantined.labels(model).inc()

    def role_switched(self, model: str, from_role: Role, to_role: Role) -> None:
        """A worker reported another role than before."""
        self._role_switches.labels(model, from_role, to_role).inc()
