"""The cases of the planner benchmark: a load by every static split, the planner and the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.planner_capacity import mix_capacity_rps, recorded_capacity_rps
from benchmarks.planner_loads import (
    GENERATED,
    LONG_ANSWERS,
    LONG_PROMPTS,
    TRACE_LOAD,
    Capacities,
    recorded,
)
from benchmarks.planner_oracle import Oracle, search, static_runs
from benchmarks.planner_runs import Run, Scene, run_planner

TRACE_SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One load on one cluster."""

    load: str
    num_gpus: int
    duration_s: float
    budget: int
    """Schedules the oracle may simulate."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CaseResult:
    """What came of a case."""

    case: Case
    capacities: Mapping[str, float]
    """Requests per second that some static split takes, by kind of request."""
    offered_rps: float
    statics: Mapping[int, Run]
    """By prefill workers."""
    planner: Run
    oracle: Oracle

    @property
    def best_static(self) -> Run:
        return max(self.statics.values(), key=lambda run: run.num_met)


def run_case(case: Case, capacities: Mapping[str, float]) -> CaseResult:
    """
    Args:
        capacities: by names of :func:`capacity_names`.
    """
    scene = case_scene(case, capacities)
    statics = static_runs(scene)
    planner = run_planner(scene, case.num_gpus // 2)
    return CaseResult(
        case=case,
        capacities={name: capacities[name] for name in capacity_names(case.load)},
        offered_rps=len(scene.trace.requests) / scene.trace.duration_s,
        statics=statics,
        planner=planner,
        oracle=search(scene, statics, planner, case.budget),
    )


def case_scene(case: Case, capacities: Mapping[str, float]) -> Scene:
    if (generated := GENERATED.get(case.load)) is not None:
        kinds = Capacities(
            long_prompts_rps=capacities["long prompts"], long_answers_rps=capacities["long answers"]
        )
        trace = generated(kinds, case.duration_s, TRACE_SEED)
    else:
        trace = recorded(case.load, TRACE_LOAD * capacities[case.load], case.duration_s, TRACE_SEED)
    return Scene(trace=trace, num_gpus=case.num_gpus)


def capacity_names(load: str) -> tuple[str, ...]:
    """What must be known to make the load."""
    return ("long prompts", "long answers") if load in GENERATED else (load,)


def capacity_of(name: str, num_gpus: int) -> float:
    """Measured by simulation."""
    mixes = {"long prompts": LONG_PROMPTS, "long answers": LONG_ANSWERS}
    return mix_capacity_rps(mixes[name], num_gpus) if name in mixes else recorded_capacity_rps(name, num_gpus)
