"""The planner on the trace and the GPUs of a static plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from core.errors import ConfigError
from planner.settings import PlannedShape, PlannerSettings
from router.policy import LeastLoadPolicy
from simulator.planning.split import Split, gpus_of
from simulator.planning.static_plan import StaticPlan
from simulator.reports.summary import summarize
from simulator.result import SimulationResult
from simulator.scenario import static_cluster
from simulator.simulation import MakePolicy, simulate
from simulator.spec import ClusterSpec
from simulator.traces.edits import window
from simulator.traces.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerRun:
    """What the planner made of it."""

    start: Split
    """How it began."""
    min_gpus: int
    result: SimulationResult
    summary: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Ready for ``simulator.reports.summary.to_json``."""
        return {"start": self.start.label, "min_gpus": self.min_gpus, "summary": self.summary}


def run_planner(
    trace: Trace,
    plan: StaticPlan,
    *,
    min_gpus: int | None = None,
    seed: int = 0,
    make_policy: MakePolicy = LeastLoadPolicy,
    on_progress: Callable[[int, int], None] | None = None,
) -> PlannerRun:
    """Simulates the planner with the GPUs and the kinds of workers of the best static split.

    Where that has one kind of worker the planner begins with half of them in each role: it is not told
    which split is best. Workers of two kinds cannot take each other's role; it begins with the best split
    and may change the counts.

    Args:
        trace: the one that was planned for, whole.
        min_gpus: GPUs it holds at least; None: all of them, all the time, if there is one kind of worker.

    Raises:
        core.errors.ConfigError: ``min_gpus`` is more than the budget, or less than any split takes.
    """
    if plan.window_s is not None:
        trace = window(trace, *plan.window_s)
    start = _start(plan)
    spec = _cluster(trace, plan, start, _checked(min_gpus, plan, start))
    result = simulate(trace, spec, make_policy=make_policy, seed=seed, on_progress=on_progress)
    settings = {"start": start.label, "seed": seed, "trace": trace.name}
    return PlannerRun(
        start=start,
        min_gpus=start.num_gpus if min_gpus is None else min_gpus,
        result=result,
        summary=summarize(result, plan.slo, settings=settings),
    )


def _start(plan: StaticPlan) -> Split:
    best = plan.best.split
    profile = best.decode_profile
    if best.num_prefill and best.prefill_profile != profile:
        return best
    num_workers = plan.num_gpus // gpus_of(profile)
    return Split(
        prefill_profile=profile,
        num_prefill=num_workers // 2,
        decode_profile=profile,
        num_decode=num_workers - num_workers // 2,
    )


def _checked(min_gpus: int | None, plan: StaticPlan, start: Split) -> int | None:
    least = gpus_of(start.decode_profile)
    if start.prefill_profile != start.decode_profile:
        least += gpus_of(start.prefill_profile)
    if min_gpus is not None and not least <= min_gpus <= plan.num_gpus:
        raise ConfigError(f"--min-gpus must be {least} to {plan.num_gpus}, not {min_gpus}")
    return min_gpus


def _cluster(trace: Trace, plan: StaticPlan, start: Split, min_gpus: int | None) -> ClusterSpec:
    spec = static_cluster(
        trace,
        prefill=start.prefill_profile,
        num_prefill=start.num_prefill,
        decode=start.decode_profile,
        num_decode=start.num_decode,
        ttft_slo_s=plan.slo.ttft_s,
        tpot_slo_s=plan.slo.tpot_s,
    )
    return replace(spec, planner=_settings(spec, plan, min_gpus))


def _settings(spec: ClusterSpec, plan: StaticPlan, min_gpus: int | None) -> PlannerSettings:
    shapes = []
    for group in spec.groups:
        gpus = max(1, round(group.gpus_per_worker))
        num_workers = sum(group.num_workers.values())
        if len(spec.groups) > 1:
            least, most = 1, plan.num_gpus // gpus
        else:
            least, most = num_workers if min_gpus is None else -(-min_gpus // gpus), num_workers
        shapes.append(
            PlannedShape(
                name=group.shape,
                allowed_roles=group.allowed_roles,
                gpus_per_worker=float(gpus),
                min_workers=least,
                max_workers=most,
                startup_s=group.startup_s,
            )
        )
    return PlannerSettings(
        shapes=tuple(shapes),
        ttft_slo_s=plan.slo.ttft_s,
        tpot_slo_s=plan.slo.tpot_s,
        gpu_budget=float(plan.num_gpus),
    )
