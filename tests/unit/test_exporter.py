"""The metrics endpoint and Prometheus's list of endpoints."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request

import pytest

from telemetry.exporter import ScrapeTarget, http_sd, new_registry, start_exporter
from telemetry.registry_metrics import RegistryMetrics


def test_an_endpoint_serves_its_registry_until_it_is_stopped() -> None:
    registry = new_registry()
    RegistryMetrics(registry).heartbeat("m")
    address, stop = start_exporter("127.0.0.1", registry)
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        text = response.read().decode()
    assert 'baton_registry_heartbeats_total{model="m"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert "_created" not in text
    stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{address}/metrics", timeout=5)


async def test_a_process_counts_the_tasks_of_its_event_loop() -> None:
    registry = new_registry()
    before = registry.get_sample_value("python_asyncio_tasks")
    task = asyncio.create_task(asyncio.sleep(60))
    assert registry.get_sample_value("python_asyncio_tasks") == before + 1
    task.cancel()


def test_a_process_without_an_event_loop_counts_no_tasks() -> None:
    assert new_registry().get_sample_value("python_asyncio_tasks") is None


def test_two_endpoints_get_two_ports_and_a_taken_one_is_an_error() -> None:
    first, second = (start_exporter("127.0.0.1", new_registry()) for _ in range(2))
    assert first.address != second.address
    with pytest.raises(OSError, match="in use"):
        start_exporter("127.0.0.1", new_registry(), port=int(first.address.rpartition(":")[2]))
    first.stop()
    second.stop()


def test_service_discovery_groups_targets_by_their_labels() -> None:
    targets = [
        ScrapeTarget(address="10.0.0.2:9", labels={"process": "worker"}),
        ScrapeTarget(address="10.0.0.1:9", labels={"process": "worker"}),
        ScrapeTarget(address="10.0.0.1:8", labels={"process": "router"}),
    ]
    assert http_sd(targets) == [
        {"targets": ["10.0.0.1:8"], "labels": {"process": "router"}},
        {"targets": ["10.0.0.1:9", "10.0.0.2:9"], "labels": {"process": "worker"}},
    ]
    assert http_sd([]) == []
