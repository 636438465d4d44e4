"""Router metrics: what requests add to them, and that users cannot make their number grow."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from core.clock import ManualClock
from core.request import Leg, Path
from core.types import Role, Snapshot, WorkerReport
from telemetry.label_limit import LabelLimit
from telemetry.router_metrics import RouterMetrics
from telemetry.slo import Outcome, SloResult, SloTargets

TARGETS = SloTargets(ttft_s=0.5, tpot_s=0.05)
WHO = {"model": "m", "adapter": "", "tenant": "t"}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def metrics(registry: CollectorRegistry, clock: ManualClock) -> RouterMetrics:
    return RouterMetrics(
        registry, slo_targets={"m": TARGETS}, clock=clock, max_label_values=2, max_label_sets=4
    )


def worker(worker_id: str, role: Role, *, draining: bool = False, trouble: str = "") -> WorkerReport:
    return WorkerReport(
        worker_id=worker_id,
        incarnation="i",
        model="m",
        revision="main",
        shape="s",
        allowed_roles=frozenset(Role),
        role=role,
        role_assigned=True,
        draining=draining,
        trouble=trouble,
        address="127.0.0.1:1",
        node_id="n",
        metrics_address="127.0.0.1:2",
        block_size_tokens=16,
        num_kv_blocks=8,
        bytes_per_block=1024,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )


def test_a_whole_answer_is_counted_timed_and_judged(
    registry: CollectorRegistry, metrics: RouterMetrics
) -> None:
    request = metrics.for_request("m", tenant="t")
    request.arrived()
    assert registry.get_sample_value("baton_inflight_requests", WHO) == 1
    request.prompt(num_tokens=100, num_cached_tokens=64)
    request.leg(Leg.PREFILL, 0.2)
    request.first_token(0.3)
    request.next_tokens(0.03)
    request.next_tokens(0.05, num_tokens=2)
    result = request.finished(Path.REMOTE_EARLY, Outcome.OK, e2e_s=0.38, ttft_s=0.3, num_output_tokens=4)

    assert result is SloResult.MET
    value = registry.get_sample_value
    assert value("baton_inflight_requests", WHO) == 0
    assert value("baton_requests_total", {**WHO, "path": "remote_early", "outcome": "ok"}) == 1
    assert value("baton_slo_requests_total", {**WHO, "result": "met"}) == 1
    assert value("baton_slo_requests_total", {**WHO, "result": "failed"}) == 0
    assert value("baton_prompt_tokens_total", WHO) == 100
    assert value("baton_cached_prompt_tokens_total", WHO) == 64
    assert value("baton_output_tokens_total", WHO) == 4
    assert value("baton_ttft_seconds_sum", WHO) == 0.3
    assert value("baton_itl_seconds_count", WHO) == 2
    assert value("baton_tpot_seconds_sum", WHO) == pytest.approx(0.08 / 3)
    assert value("baton_e2e_seconds_sum", WHO) == 0.38
    assert value("baton_leg_seconds_sum", {**WHO, "leg": "prefill"}) == 0.2


def test_several_choices_share_the_tokens(registry: CollectorRegistry, metrics: RouterMetrics) -> None:
    request = metrics.for_request("m", tenant="t")
    request.arrived()
    request.finished(Path.LOCAL, Outcome.OK, e2e_s=0.5, ttft_s=0.1, num_output_tokens=10, num_choices=2)
    assert registry.get_sample_value("baton_tpot_seconds_sum", WHO) == pytest.approx(0.1)


def test_a_rejected_request_is_a_miss_without_latency(
    registry: CollectorRegistry, metrics: RouterMetrics
) -> None:
    request = metrics.for_request("m", tenant="t")
    request.arrived()
    assert request.finished(Path.NONE, Outcome.REJECTED, e2e_s=0.001) is SloResult.FAILED
    assert registry.get_sample_value("baton_e2e_seconds_count", WHO) is None
    assert registry.get_sample_value("baton_inflight_requests", WHO) == 0


def test_requests_of_a_model_without_targets_are_not_judged(metrics: RouterMetrics) -> None:
    request = metrics.for_request("another")
    assert request.finished(Path.LOCAL, Outcome.OK, e2e_s=1, ttft_s=0.5, num_output_tokens=2) is None


def test_what_went_wrong_between_the_legs_is_counted_by_reason(
    registry: CollectorRegistry, metrics: RouterMetrics
) -> None:
    request = metrics.for_request("m", tenant="t")
    request.prefill_fell_back("overloaded")
    request.kv_recomputed("lease_expired")
    request.kv_transferred(4096)
    value = registry.get_sample_value
    assert value("baton_prefill_fallbacks_total", {**WHO, "reason": "overloaded"}) == 1
    assert value("baton_kv_recomputes_total", {**WHO, "reason": "lease_expired"}) == 1
    assert value("baton_kv_transfer_bytes_total", WHO) == 4096


def test_requests_of_the_same_labels_share_their_metrics(metrics: RouterMetrics) -> None:
    assert metrics.for_request("m", "a", "t") is metrics.for_request("m", "a", "t")


def test_tenants_and_adapters_beyond_the_limit_become_other(metrics: RouterMetrics) -> None:
    for tenant in ("t1", "t2", "t3", "t4"):
        metrics.for_request("m", tenant=tenant)
    assert metrics.for_request("m", tenant="t3") is metrics.for_request("m", tenant="other")
    assert metrics.for_request("m", tenant="t1") is not metrics.for_request("m", tenant="other")


def test_combinations_beyond_the_limit_become_other(
    registry: CollectorRegistry, metrics: RouterMetrics
) -> None:
    for adapter in ("", "a1", "a2"):
        for tenant in ("", "t1", "t2"):
            metrics.for_request("m", adapter, tenant).first_token(0.1)
    seen = {
        (sample.labels["adapter"], sample.labels["tenant"])
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "baton_ttft_seconds_count"
    }
    assert seen == {("", ""), ("", "t1"), ("", "t2"), ("a1", ""), ("other", "other")}


def test_a_limit_lets_the_empty_value_and_the_first_ones_through() -> None:
    limit = LabelLimit(2)
    assert [limit(value) for value in ("a", "", "b", "c", "a", "other")] == [
        "a",
        "",
        "b",
        "other",
        "a",
        "other",
    ]


def test_a_snapshots_workers_are_counted_and_an_emptied_pool_reads_zero(
    registry: CollectorRegistry, metrics: RouterMetrics
) -> None:
    def count(role: str, state: str) -> float | None:
        return registry.get_sample_value("baton_workers", {"model": "m", "role": role, "state": state})

    workers = (
        worker("p", Role.PREFILL),
        worker("d1", Role.DECODE),
        worker("d2", Role.DECODE, draining=True),
        worker("d3", Role.DECODE, draining=True, trouble="its engine does not answer"),
    )
    metrics.snapshot_received(Snapshot(incarnation="i", epoch=1, workers=workers))
    assert count("prefill", "active") == 1
    assert count("decode", "active") == 1
    assert count("decode", "draining") == 1
    assert count("decode", "quarantined") == 1
    metrics.snapshot_received(Snapshot(incarnation="i", epoch=2, workers=()))
    assert count("decode", "active") == 0


def test_the_snapshots_age_starts_with_the_router_and_again_with_every_snapshot(
    registry: CollectorRegistry, metrics: RouterMetrics, clock: ManualClock
) -> None:
    clock.advance(7)
    assert registry.get_sample_value("baton_snapshot_age_seconds") == 7
    metrics.snapshot_received(Snapshot(incarnation="i", epoch=1))
    clock.advance(2)
    assert registry.get_sample_value("baton_snapshot_age_seconds") == 2


def test_targets_are_exposed_in_seconds(registry: CollectorRegistry, metrics: RouterMetrics) -> None:
    for slo, target_s in (("ttft", 0.5), ("tpot", 0.05)):
        assert registry.get_sample_value("baton_slo_target_seconds", {"model": "m", "slo": slo}) == target_s
