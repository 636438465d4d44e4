"""The per-token metrics against prometheus_client's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from telemetry.hot import HotCounter, HotHistogram

BUCKETS = (0.001, 0.01, 0.5, 2)


def exposition(registry: CollectorRegistry) -> list[bytes]:
    return [line for line in generate_latest(registry).splitlines() if b"_created" not in line]


@given(st.lists(st.sampled_from([0.0, 0.0005, 0.001, 0.0011, 0.25, 0.5, 2.0, 2.5, 100.0])))
def test_a_hot_histogram_exposes_what_an_ordinary_one_does(values: list[float]) -> None:
    hot_registry, registry = CollectorRegistry(), CollectorRegistry()
    hot = HotHistogram("x_seconds", "Help.", ("model",), buckets=BUCKETS)
    hot_registry.register(hot)
    child = hot.labels("m")
    ordinary = Histogram("x_seconds", "Help.", ("model",), buckets=BUCKETS, registry=registry).labels("m")
    for value in values:
        child.observe(value)
        ordinary.observe(value)
    assert exposition(hot_registry) == exposition(registry)


def test_a_hot_counter_exposes_what_an_ordinary_one_does() -> None:
    hot_registry, registry = CollectorRegistry(), CollectorRegistry()
    hot = HotCounter("x_total", "Help.", ("model",))
    hot_registry.register(hot)
    hot.labels("m").value += 3
    hot.labels("m").value += 1
    Counter("x_total", "Help.", ("model",), registry=registry).labels("m").inc(4)
    assert exposition(hot_registry) == exposition(registry)


def test_a_name_can_be_registered_only_once() -> None:
    registry = CollectorRegistry()
    registry.register(HotCounter("x_total", "Help.", ()))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(HotCounter("x_total", "Help.", ()))
