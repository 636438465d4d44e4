"""Worker and registry metrics."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from core.types import Role, Snapshot, WorkerLoad
from telemetry.registry_metrics import RegistryMetrics
from telemetry.worker_metrics import WorkerMetrics

ME = {"model": "m", "shape": "s", "worker": "w1"}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def worker(registry: CollectorRegistry) -> WorkerMetrics:
    return WorkerMetrics(registry, model="m", shape="s", worker_id="w1")


def test_a_worker_has_one_role_at_a_time(registry: CollectorRegistry, worker: WorkerMetrics) -> None:
    worker.set_role(Role.PREFILL)
    worker.set_role(Role.DECODE)
    assert registry.get_sample_value("baton_worker_role", {**ME, "role": "prefill"}) == 0
    assert registry.get_sample_value("baton_worker_role", {**ME, "role": "decode"}) == 1


def test_load_capacity_and_start_up_are_gauges(registry: CollectorRegistry, worker: WorkerMetrics) -> None:
    worker.set_capacity(64)
    worker.set_draining(True)
    worker.set_startup({"engine": 4.5})
    worker.set_load(
        WorkerLoad(num_running=3, num_waiting=2, waiting_prefill_tokens=900, kv_used_blocks=40, num_pinned=1)
    )
    value = registry.get_sample_value
    assert value("baton_worker_kv_capacity_blocks", ME) == 64
    assert value("baton_worker_draining", ME) == 1
    assert value("baton_worker_startup_seconds", {**ME, "phase": "engine"}) == 4.5
    assert value("baton_worker_running_requests", ME) == 3
    assert value("baton_worker_waiting_requests", ME) == 2
    assert value("baton_worker_waiting_prefill_tokens", ME) == 900
    assert value("baton_worker_kv_used_blocks", ME) == 40
    assert value("baton_worker_pinned_prompts", ME) == 1


def test_both_legs_work_is_counted(registry: CollectorRegistry, worker: WorkerMetrics) -> None:
    worker.prompt_computed(queue_s=0.01, prefill_s=0.2, num_tokens=100, num_cached_tokens=32)
    worker.tokens_sampled(5)
    worker.finished(Role.PREFILL, "length")
    worker.refused(Role.DECODE, "draining")
    worker.leases_expired(2)
    value = registry.get_sample_value
    assert value("baton_worker_queue_seconds_sum", ME) == 0.01
    assert value("baton_worker_prefill_seconds_sum", ME) == 0.2
    assert value("baton_worker_prompt_tokens_total", ME) == 100
    assert value("baton_worker_cached_prompt_tokens_total", ME) == 32
    assert value("baton_worker_output_tokens_total", ME) == 5
    assert value("baton_worker_requests_total", {**ME, "leg": "prefill", "outcome": "length"}) == 1
    assert value("baton_worker_refused_requests_total", {**ME, "leg": "decode", "reason": "draining"}) == 1
    assert value("baton_worker_leases_expired_total", ME) == 2


def test_a_kv_handle_is_pulled_cached_or_recomputed(
    registry: CollectorRegistry, worker: WorkerMetrics
) -> None:
    worker.kv_pulled(1 << 20, 0.05)
    worker.kv_cached()
    worker.kv_recomputed("digest")
    value = registry.get_sample_value
    for outcome in ("pulled", "cached", "recomputed"):
        assert value("baton_worker_kv_handles_total", {**ME, "outcome": outcome}) == 1
    assert value("baton_worker_kv_pulled_bytes_total", ME) == 1 << 20
    assert value("baton_worker_kv_pull_seconds_sum", ME) == 0.05
    assert value("baton_worker_kv_recomputes_total", {**ME, "reason": "digest"}) == 1


def test_the_registry_shows_membership_and_its_changes(registry: CollectorRegistry) -> None:
    metrics = RegistryMetrics(registry)
    metrics.set_snapshot(Snapshot(incarnation="i", epoch=4))
    metrics.set_publishing(True)
    metrics.heartbeat("m")
    metrics.snapshot_served()
    metrics.worker_dropped("m", "silent")
    metrics.role_switched("m", Role.PREFILL, Role.DECODE)
    value = registry.get_sample_value
    assert value("baton_registry_epoch") == 4
    assert value("baton_registry_publishing") == 1
    assert value("baton_registry_heartbeats_total", {"model": "m"}) == 1
    assert value("baton_registry_snapshots_total") == 1
    assert value("baton_registry_dropped_workers_total", {"model": "m", "reason": "silent"}) == 1
    switched = {"model": "m", "from_role": "prefill", "to_role": "decode"}
    assert value("baton_registry_role_switches_total", switched) == 1
