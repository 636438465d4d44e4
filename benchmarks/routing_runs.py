"""The routing experiments' traces, clusters and runs.

The load factor says how much of the prefill workers' time the prompts would take without any cache: at 1.0
the trace comes so fast that computing all of every prompt takes exactly as long as the trace lasts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.model import CACHE
from benchmarks.routing_bound import most_in_time, reusable_tokens
from core.step_times import prefill_s
from core.table_step_time import TableStepTime
from router.policies import make_policy
from router.routing import RoutingPolicy
from simulator.profiles.files import find_profile
from simulator.reports.summary import slo_met
from simulator.result import Floats, SimulationResult, Slo
from simulator.scenario import static_cluster
from simulator.simulation import simulate
from simulator.spec import ClusterSpec
from simulator.traces.edits import scale_rate
from simulator.traces.readers import read_trace
from simulator.traces.trace import Trace

PROFILE = "h200-llama-3.1-8b-fp8-tp1"
SLO = Slo(ttft_s=0.5, tpot_s=0.03)
TRACES_VARIABLE = "BATON_TRACES"
TRACE_FILES = {
    "Mooncake conversation": "mooncake_conversation.jsonl",
    "Mooncake synthetic": "mooncake_synthetic.jsonl",
    "Azure conversation": "azure2023_conv.csv",
}
FIRST_REQUEST = {"Mooncake conversation": 4000, "Mooncake synthetic": 2000, "Azure conversation": 8000}
"""What comes before was used to choose the policy's constants."""
PREFILL_SHARE = 5 / 8
_PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One simulation."""

    trace: str
    num_workers: int
    load: float
    policy: str
    num_requests: int
    num_routers: int = 1
    with_bound: bool = False

    @property
    def num_prefill(self) -> int:
        return int(PREFILL_SHARE * self.num_workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Shares of all requests that no policy exceeds."""

    attainment: float
    with_own_caches: float
    """...if prompts find cached just what they found in the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What came of a case."""

    num_requests: int
    duration_s: float
    attainment: float
    ttft_attainment: float
    goodput_rps: float
    """Requests that met both targets, by the time in which requests arrived."""
    ttft_s: tuple[float, ...]
    """p50, p90, p99."""
    tpot_s: tuple[float, ...]
    cached_share: float
    bound: Bound | None = None


def traces_folder() -> Path:
    """
    Raises:
        FileNotFoundError: a trace is missing; says which and where they are published.
    """
    folder = Path(os.environ.get(TRACES_VARIABLE) or CACHE / "traces")
    for file in TRACE_FILES.values():
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder / file} is missing: put the traces there, or name their folder in "
                f"{TRACES_VARIABLE} (docs/benchmarks.md says where they are published)"
            )
    return folder


def run(case: Case) -> Figures:
    """Simulates a case, the same every time."""
    trace = case_trace(case)
    spec = cluster(case, trace)

    def policy(seed: int) -> RoutingPolicy:
        return make_policy(case.policy, seed)

    result = simulate(trace, spec, make_policy=policy, seed=1)
    return figures(trace, spec, result, with_bound=case.with_bound)


def figures(trace: Trace, spec: ClusterSpec, result: SimulationResult, *, with_bound: bool) -> Figures:
    requests = result.requests
    ttft_met, tpot_met = slo_met(requests, SLO)
    met, num_requests = ttft_met & tpot_met, len(trace.requests)
    bound = None
    if with_bound:
        best = most_in_time(trace, spec, SLO, reusable_tokens(trace, SLO.ttft_s))
        with_own_caches = most_in_time(trace, spec, SLO, requests.cached_tokens)
        bound = Bound(attainment=best / num_requests, with_own_caches=with_own_caches / num_requests)
    return Figures(
        num_requests=num_requests,
        duration_s=trace.duration_s,
        attainment=float(met.mean()),
        ttft_attainment=float(ttft_met.mean()),
        goodput_rps=float(met.sum()) / trace.duration_s,
        ttft_s=_percentiles(requests.ttft_s),
        tpot_s=_percentiles(requests.tpot_s),
        cached_share=float(requests.cached_tokens.sum() / requests.prompt_tokens.sum()),
        bound=bound,
    )


def cluster(case: Case, trace: Trace) -> ClusterSpec:
    profile = find_profile(PROFILE)
    return static_cluster(
        trace,
        prefill=profile,
        num_prefill=case.num_prefill,
        decode=profile,
        num_decode=case.num_workers - case.num_prefill,
        ttft_slo_s=SLO.ttft_s,
        tpot_slo_s=SLO.tpot_s,
        num_routers=case.num_routers,
    )


def case_trace(case: Case) -> Trace:
    """The excerpt at the rate that makes the case's load."""
    trace = _excerpt(case.trace, case.num_requests)
    rate = case.load * case.num_prefill * trace.duration_s / _uncached_s(case.trace, case.num_requests)
    return scale_rate(trace, rate)


@cache
def _excerpt(name: str, num_requests: int) -> Trace:
    trace = read_trace(traces_folder() / TRACE_FILES[name])
    first = min(FIRST_REQUEST[name], max(0, len(trace.requests) - num_requests))
    requests = trace.requests[first : first + num_requests]
    start_s = requests[0].arrival_s
    return replace(trace, requests=tuple(replace(r, arrival_s=r.arrival_s - start_s) for r in requests))


@cache
def _uncached_s(name: str, num_requests: int) -> float:
    """Computing time of all prompts, nothing cached."""
    step_time = TableStepTime(find_profile(PROFILE))
    return sum(prefill_s(step_time, r.prompt_tokens, 0) for r in _excerpt(name, num_requests).requests)


def _percentiles(seconds: Floats) -> tuple[float, ...]:
    return tuple(np.nanpercentile(seconds, _PERCENTS).tolist())


Results = Mapping[Case, Figures]
