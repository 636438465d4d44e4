"""A Prometheus endpoint for a process, and the list of endpoints that Prometheus asks for.

Every process has its own endpoint on a free port, so Prometheus finds them through HTTP service
discovery (https://prometheus.io/docs/prometheus/latest/http_sd/) at the router.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from core.types import Snapshot


class MetricsEndpoint(NamedTuple):
    """A running endpoint."""

    address: str
    """host:port, as it goes into a heartbeat."""
    stop: Callable[[], None]
    """Closes the port; returns when no request is being answered any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrapeTarget:
    """An endpoint for Prometheus to scrape.

    Labels must not repeat those of the metrics there (model, shape, worker): Prometheus would rename one.
    """

    address: str
    labels: Mapping[str, str] = field(default_factory=dict)


def new_registry() -> CollectorRegistry:
    """A registry with the process's own CPU, memory and file metrics in it, and its event loop's tasks."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    with contextlib.suppress(RuntimeError):  # no event loop runs here
        registry.register(_TaskCollector(asyncio.get_running_loop()))
    return registry


class _TaskCollector(Collector):
    """Counts the tasks of an event loop: one that leaks them shows it here first."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[GaugeMetricFamily]:
        num_tasks = len(asyncio.all_tasks(self._loop))
        yield GaugeMetricFamily("python_asyncio_tasks", "Tasks of the process's event loop.", num_tasks)


def start_exporter(host: str, registry: CollectorRegistry, port: int = 0) -> MetricsEndpoint:
    """Serves the registry's metrics from a thread of its own.

    Args:
        host: address to bind, one that Prometheus can reach.
        registry: what to serve.
        port: 0 for a free one.

    Raises:
        OSError: the port is taken or the host is not an address of this machine.
    """
    # A time series of its own for the birth of every child, which no dashboard here asks for.
    disable_created_metrics()
    server, thread = start_http_server(port, addr=host, registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    shown_host = f"[{host}]" if ":" in host else host
    return MetricsEndpoint(f"{shown_host}:{server.server_port}", stop)


def worker_targets(snapshot: Snapshot) -> list[ScrapeTarget]:
    """The endpoints of a snapshot's workers."""
    return [
        ScrapeTarget(address=worker.metrics_address, labels={"process": "worker", "node": worker.node_id})
        for worker in snapshot.workers
        if worker.metrics_address
    ]


def http_sd(targets: Iterable[ScrapeTarget]) -> list[dict[str, Any]]:
    """The JSON value Prometheus's ``http_sd_configs`` expects, targets of equal labels together."""
    groups: dict[tuple[tuple[str, str], ...], set[str]] = defaultdict(set)
    for target in targets:
        groups[tuple(sorted(target.labels.items()))].add(target.address)
    return [
        {"targets": sorted(addresses), "labels": dict(labels)} for labels, addresses in sorted(groups.items())
    ]
