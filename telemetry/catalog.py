"""Makes metrics and remembers what it made, so that docs/metrics.md comes from the objects themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from telemetry.hot import HotCounter, HotHistogram

LATENCY_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60),
)
"""1 ms to 60 s, closest together where TTFT targets usually lie."""

WHOLE_ANSWER_BUCKETS_S = (*LATENCY_BUCKETS_S, 120, 300, 600)
"""Long answers stream for minutes."""

TOKEN_GAP_BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2),
)
"""1 ms to 2 s: one step of an engine."""

LEG_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
    *(0.2, 0.5, 1, 2, 5, 10, 20, 60),
)
"""Coarse, because there are eight legs for every model, adapter and tenant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInfo:
    """One metric as Prometheus shows it."""

    name: str
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    unit: str
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()
    """Upper bounds without +Inf; empty for anything but a histogram."""


class Catalog:
    """Creates metrics in one registry and keeps a list of them.

    Args:
        registry: where the metrics are exposed.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.metrics: list[MetricInfo] = []

    def counter(self, name: str, unit: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        """Makes a counter; ``name`` ends in ``_total``."""
        self._add("counter", name, unit, help_text, labels)
        return Counter(name, help_text, labels, registry=self.registry)

    def gauge(self, name: str, unit: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
        """Makes a gauge."""
        self._add("gauge", name, unit, help_text, labels)
        return Gauge(name, help_text, labels, registry=self.registry)

    def histogram(
        self, name: str, help_text: str, labels: Sequence[str] = (), *, buckets: Sequence[float]
    ) -> Histogram:
        """Makes a histogram of seconds."""
        self._add("histogram", name, "seconds", help_text, labels, buckets)
        return Histogram(name, help_text, labels, buckets=buckets, registry=self.registry)

    def hot_counter(self, name: str, unit: str, help_text: str, labels: Sequence[str] = ()) -> HotCounter:
        """Makes a counter for the per-token path; ``name`` ends in ``_total``."""
        self._add("counter", name, unit, help_text, labels)
        counter = HotCounter(name, help_text, labels)
        self.registry.register(counter)
        return counter

    def hot_histogram(
        self, name: str, help_text: str, labels: Sequence[str] = (), *, buckets: Sequence[float]
    ) -> HotHistogram:
        """Makes a histogram of seconds for the per-token path."""
        self._add("histogram", name, "seconds", help_text, labels, buckets)
        histogram = HotHistogram(name, help_text, labels, buckets=buckets)
        self.registry.register(histogram)
        return histogram

    def _add(
        self,
        kind: str,
        name: str,
        unit: str,
        help_text: str,
        labels: Sequence[str],
        buckets: Sequence[float] = (),
    ) -> None:
        assert kind != "counter" or name.endswith("_total"), name
        self.metrics.append(
            MetricInfo(
                name=name,
                kind=kind,
                unit=unit,
                help=help_text,
                labels=tuple(labels),
                buckets=tuple(buckets),
            )
        )
