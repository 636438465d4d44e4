"""Admission control in the simulated cluster: overload, priorities, tenants, one router and four."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.performance_model import LinearStepTime
from core.worker_events import SequenceSpec, WorkerModelConfig
from router.admission import AdmissionController
from router.admission_limits import AdmissionLimits
from router.policies import make_policy
from simulator.actions import Kill
from simulator.reports.summary import slo_met, summarize
from simulator.result import Outcome, SimulationResult, Slo
from simulator.simulation import simulate
from simulator.spec import ClusterSpec
from simulator.traces.draws import LognormalLengths, Poisson
from simulator.traces.generators import Independent, generate
from simulator.traces.trace import Trace, TraceRequest
from simulator.worker import Leg, SimulatedWorker
from tests.unit.simulated import cluster

STEP = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.04,
    prefill_base_ms=5.0,
    decode_base_ms=5.0,
    decode_ms_per_seq=0.5,
    decode_ms_per_kv_token=0.0,
)
WORKER = WorkerModelConfig(
    num_kv_blocks=20_000, block_size_tokens=16, max_num_seqs=128, max_num_batched_tokens=2048
)
SLO = Slo(ttft_s=0.5, tpot_s=0.03)
DURATION_S = 20.0
PROMPTS = 20.0, (1000.0, 4000.0), (20.0, 60.0)
"""About what one prefill worker computes: requests a second, and mean and p99 of prompts and answers."""
ANSWERS = 7.0, (200.0, 800.0), (200.0, 800.0)
"""About what one decode worker computes within the target."""

Change = Callable[[TraceRequest, int], TraceRequest]


def load(kind: Any, factor: float, seed: int = 0, change: Change | None = None) -> Trace:
    """``factor`` times what two workers can do."""
    rate, prompt, output = kind
    trace = generate(
        Independent(
            arrivals=Poisson(rate_rps=2 * rate * factor),
            duration_s=DURATION_S,
            prompt=LognormalLengths(mean=prompt[0], p99=prompt[1]),
            output=LognormalLengths(mean=output[0], p99=output[1]),
        ),
        seed,
    )
    if change is None:
        return trace
    requests = tuple(change(request, index) for index, request in enumerate(trace.requests))
    return replace(trace, requests=requests)


def spec(**more: Any) -> ClusterSpec:
    settings: dict[str, Any] = {
        "admission": AdmissionLimits(),
        "ttft_slo_s": SLO.ttft_s,
        "tpot_slo_s": SLO.tpot_s,
    }
    group = {"step_time": STEP, "worker": WORKER, "kv_bytes_per_token": 10}
    return cluster(2, 2, group_settings=group, **(settings | more))


def run(
    trace: Trace, what: ClusterSpec, policy: str = "least_load", actions: Sequence[Any] = ()
) -> SimulationResult:
    return simulate(trace, what, make_policy=lambda seed: make_policy(policy, seed), actions=actions)


def attained(result: SimulationResult) -> np.ndarray[Any, np.dtype[np.bool_]]:
    ttft_met, tpot_met = slo_met(result.requests, SLO)
    return ttft_met & tpot_met


def admitted(result: SimulationResult) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return result.requests.outcome != Outcome.REJECTED.value


def trace_s(trace: Trace) -> np.ndarray[Any, np.dtype[np.float64]]:
    """When each request arrived."""
    return np.array([request.arrival_s for request in trace.requests])


def served_share(result: SimulationResult, some: Any) -> float:
    """Of some requests, the share that met their targets."""
    return float(attained(result)[some].mean())


@pytest.mark.parametrize("num_routers", [1, 4])
@pytest.mark.parametrize("policy", ["least_load", "predictive"])
@pytest.mark.parametrize("kind", [PROMPTS, ANSWERS], ids=["prompts", "answers"])
def test_at_three_times_the_capacity_what_is_admitted_is_served_in_time(
    kind: Any, policy: str, num_routers: int
) -> None:
    trace = load(kind, 3.0)
    result = run(trace, spec(num_routers=num_routers), policy)
    unlimited = run(trace, spec(num_routers=num_routers, admission=None), policy)

    met, taken = attained(result), admitted(result)
    # Four routers need the first seconds to learn what each other's prompts do to decode workers.
    late = trace_s(trace) > 8.0 if num_routers > 1 and policy == "predictive" else taken
    assert met[taken & late].mean() >= 0.88
    assert met.mean() >= 0.25
    assert met.mean() >= 2 * attained(unlimited).mean()


@pytest.mark.parametrize("kind", [PROMPTS, ANSWERS], ids=["prompts", "answers"])
def test_below_saturation_it_changes_next_to_nothing(kind: Any) -> None:
    trace = load(kind, 0.6)
    with_it, without = run(trace, spec(), "predictive"), run(trace, spec(admission=None), "predictive")

    assert attained(with_it).mean() >= attained(without).mean() - 0.01
    assert with_it.requests.ttft_s.mean() <= 1.05 * without.requests.ttft_s.mean() + 0.001


def test_a_router_that_rests_between_two_looks_at_its_line_serves_about_as_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks_s: list[float] = []
    update = AdmissionController.update

    def note(controller: AdmissionController) -> None:
        looks_s.append(controller._clock.now_s())
        update(controller)

    monkeypatch.setattr(AdmissionController, "update", note)
    trace = load(PROMPTS, 1.5)
    restless, num_restless = run(trace, spec(), "predictive"), len(looks_s)
    looks_s.clear()
    resting = run(trace, spec(admission_rest_s=0.01), "predictive")

    assert min(np.diff(looks_s)) >= 0.01 - 1e-9
    assert 100 < len(looks_s) < num_restless
    assert attained(resting).mean() >= attained(restless).mean() - 0.03


def test_no_rejected_request_has_ever_reached_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[int] = set()
    submit = SimulatedWorker.submit

    def note(worker: SimulatedWorker, what: SequenceSpec, leg: Leg, *, promised: bool = False) -> None:
        reached.add(int(what.request_id.partition(".")[0]))
        submit(worker, what, leg, promised=promised)

    monkeypatch.setattr(SimulatedWorker, "submit", note)
    result = run(load(PROMPTS, 3.0), spec())

    rejected = np.flatnonzero(result.requests.outcome == Outcome.REJECTED.value)
    assert len(rejected) > 100
    assert reached.isdisjoint(rejected.tolist())
    assert len(reached) == len(result.requests.outcome) - len(rejected)


@pytest.mark.parametrize("num_routers", [1, 4])
@pytest.mark.parametrize("kind", [PROMPTS, ANSWERS], ids=["prompts", "answers"])
def test_urgent_requests_are_served_while_others_are_shed(kind: Any, num_routers: int) -> None:
    def change(request: TraceRequest, index: int) -> TraceRequest:
        return replace(request, priority=-1 if index % 5 < 1 else 0)

    trace = load(kind, 3.0, change=change)
    result = run(trace, spec(num_routers=num_routers))

    demands = result.requests.demands
    assert demands is not None
    urgent = demands.priority < 0
    # What is urgent at one router cannot displace what the others have sent.
    assert served_share(result, urgent) >= (0.95 if num_routers == 1 else 0.75)
    assert served_share(result, ~urgent) <= 0.5


@pytest.mark.parametrize("num_routers", [1, 4])
@pytest.mark.parametrize("kind", [PROMPTS, ANSWERS], ids=["prompts", "answers"])
def test_a_tenant_with_ten_times_the_requests_leaves_the_other_its_share(kind: Any, num_routers: int) -> None:
    """The small tenant asks for 3/11 of the capacity, less than the half that is its share."""

    def change(request: TraceRequest, index: int) -> TraceRequest:
        return replace(request, tenant="small" if index % 44 < 4 else "big")

    trace = load(kind, 3.0, change=change)
    result = run(trace, spec(num_routers=num_routers))

    demands = result.requests.demands
    assert demands is not None
    small = demands.tenant == "small"
    assert served_share(result, small) >= (0.8 if num_routers == 1 else 1.2 * served_share(result, ~small))
    assert served_share(result, ~small) <= 0.6


def test_an_unimportant_request_waits_no_longer_than_the_bound() -> None:
    """Without early rejection: (p - q + 1) * aging_s, and then what came before and meanwhile."""

    def change(request: TraceRequest, index: int) -> TraceRequest:
        return replace(request, priority=2 if index == 30 else 0)

    limits = AdmissionLimits(early_rejection=False, aging_s=1.0, max_wait_s=1000.0, max_queue_requests=10_000)
    trace = load(PROMPTS, 3.0, change=change)
    result = run(trace, spec(admission=limits))

    arrival_s, ttft_s = result.requests.arrival_s, result.requests.ttft_s
    young = arrival_s > arrival_s[30] + 3.0 + 0.1
    young[30] = False
    first_token_s = arrival_s + ttft_s
    # Sent just before the younger ones: those on another worker may overtake it by what is sent ahead.
    assert first_token_s[30] <= first_token_s[young].min() + limits.dispatch_ahead_s + 0.2
    assert (result.requests.outcome == Outcome.DONE.value).all()


def test_each_request_may_bring_its_own_targets() -> None:
    def change(request: TraceRequest, index: int) -> TraceRequest:
        return replace(request, ttft_slo_s=5.0 if index % 2 else None)

    trace = load(PROMPTS, 2.0, change=change)
    result = run(trace, spec())

    patient = np.arange(len(trace.requests)) % 2 == 1
    ttft_s = result.requests.ttft_s
    assert np.nanmedian(ttft_s[patient]) > 0.6
    assert np.nanmax(ttft_s[~patient]) < 1.0
    assert attained(result)[patient & (ttft_s > 1.0) & (ttft_s < 5.0)].mean() > 0.9


def test_with_one_seed_two_runs_are_alike() -> None:
    trace = load(PROMPTS, 2.0)
    one, two = (summarize(run(trace, spec(num_routers=2)), SLO, settings={}) for _ in range(2))
    assert one == two


def test_refusals_and_groups_are_in_the_summary() -> None:
    def change(request: TraceRequest, index: int) -> TraceRequest:
        return replace(request, priority=index % 2, tenant="ab"[index % 2])

    result = run(load(PROMPTS, 3.0, change=change), spec())
    summary = summarize(result, SLO, settings={})

    assert sum(summary["refusals"].values()) == summary["num_rejected"]
    assert set(summary["by_priority"]) == {"0", "1"}
    assert set(summary["by_tenant"]) == {"a", "b"}
    assert summary["by_priority"]["0"]["attainment"] > summary["by_priority"]["1"]["attainment"]


def test_what_waits_goes_on_when_a_worker_dies() -> None:
    trace = load(PROMPTS, 1.5)
    result = run(trace, spec(), actions=[Kill(time_s=5.0, worker_id="w-0")])

    assert set(result.requests.outcome) <= {Outcome.DONE.value, Outcome.REJECTED.value}
    late = result.requests.arrival_s > 6.0
    assert served_share(result, late) > 0.2
