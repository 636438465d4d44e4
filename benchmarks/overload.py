"""Three times the load the prefill workers can compute, with admission control and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.routing_runs import SLO, Case, case_trace, cluster
from benchmarks.table import Table
from router.admission_limits import AdmissionLimits
from router.policies import make_policy
from simulator.reports.summary import slo_met
from simulator.result import Outcome
from simulator.simulation import simulate
from simulator.traces.trace import Trace

LOAD = 3.0
NUM_WORKERS = 16
TRACES = {"Mooncake conversation": 2500, "Azure conversation": 9000}
QUICK_SHARE = 0.3
URGENT_EVERY = 5
"""One request in so many is urgent: priority 0, the others 1."""
NO_CONTROL, CONTROL, PRIORITIES = "none", "admission", "admission, priorities"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """One run; shares are of the requests named, nan where there are none."""

    trace: str
    control: str
    offered_rps: float
    admitted_share: float
    goodput_rps: float
    admitted_attainment: float
    admitted_ttft_p99_s: float
    urgent_attainment: float
    """Of all urgent requests, refused ones among them."""
    other_attainment: float


def measure(share: float, progress: Callable[[str], None]) -> list[Overload]:
    """
    Raises:
        FileNotFoundError: a trace is missing.
    """
    runs = []
    for name, num_requests in TRACES.items():
        for control in (NO_CONTROL, CONTROL, PRIORITIES):
            progress(f"{name}, {control}")
            runs.append(_run(name, control, int(share * num_requests)))
    return runs


def _run(name: str, control: str, num_requests: int) -> Overload:
    case = Case(
        trace=name, num_workers=NUM_WORKERS, load=LOAD, policy="predictive", num_requests=num_requests
    )
    trace = case_trace(case)
    urgent = np.arange(len(trace.requests)) % URGENT_EVERY == 0
    if control == PRIORITIES:
        trace = with_priorities(trace)
    spec = cluster(case, trace)
    if control != NO_CONTROL:
        spec = replace(spec, admission=AdmissionLimits())
    result = simulate(trace, spec, make_policy=lambda seed: make_policy(case.policy, seed), seed=1)
    ttft_met, tpot_met = slo_met(result.requests, SLO)
    met, admitted = ttft_met & tpot_met, result.requests.outcome == Outcome.DONE
    return Overload(
        trace=name,
        control=control,
        offered_rps=len(trace.requests) / trace.duration_s,
        admitted_share=float(admitted.mean()),
        goodput_rps=float(met.sum()) / trace.duration_s,
        admitted_attainment=float(met[admitted].mean()),
        admitted_ttft_p99_s=float(np.percentile(result.requests.ttft_s[admitted], 99)),
        urgent_attainment=float(met[urgent].mean()),
        other_attainment=float(met[~urgent].mean()),
    )


def with_priorities(trace: Trace) -> Trace:
    requests = (
        replace(request, priority=int(number % URGENT_EVERY > 0))
        for number, request in enumerate(trace.requests)
    )
    return replace(trace, requests=tuple(requests))


def tables(runs: Sequence[Overload]) -> list[Table]:
    rows = [
        (
            f"{run.trace}, {run.control}",
            f"{run.offered_rps:.1f}",
            f"{run.goodput_rps:.1f}",
            f"{1 - run.admitted_share:.1%}",
            f"**{run.admitted_attainment:.1%}**",
            f"{1e3 * run.admitted_ttft_p99_s:,.0f}",
            f"{run.urgent_attainment:.1%}",
            f"{run.other_attainment:.1%}",
        )
        for run in runs
    ]
    headers = [
        "trace, control",
        "offered a second",
        "goodput",
        "refused",
        "in time, of the admitted",
        "their TTFT p99, ms",
        "in time, of all urgent",
        "of all others",
    ]
    return [Table(f"Load {LOAD:g} on {NUM_WORKERS} workers", headers, rows)]


def as_json(runs: Sequence[Overload]) -> list[dict[str, Any]]:
    return [asdict(run) for run in runs]
