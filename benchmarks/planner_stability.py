"""Loads that do not shift: how often the planner switches all the same, and what its decisions cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.planner_loads import MIDDLE, constant, stationary
from benchmarks.planner_runs import HOUR_S, Run, Scene, run_planner, run_static
from benchmarks.table import Table

CONSTANT, POISSON = "constant", "Poisson"
LOADS = (0.3, 0.6, 0.8)
SETTLED_S = 120.0
"""Switches before that are not held against the planner: it starts with half of the GPUs in each role."""
COST_GPUS = 64
COST_REQUESTS = 30_000
_COST_LOAD = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """A load that stays."""

    kind: str
    load: float
    num_gpus: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the planner did."""

    steady: Steady
    split: str
    """At the end."""
    switches: int
    """In all."""
    settled_per_hour: float
    """After ``SETTLED_S``."""
    attainment: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one run with the planner and one without, CPU seconds of one core."""

    num_requests: int
    num_gpus: int
    with_planner_s: float
    without_s: float
    num_decisions: int
    decision_mean_s: float
    decision_max_s: float


def settle(steady: Steady, capacity_rps: float) -> Settled:
    """
    Args:
        capacity_rps: of the load's kind on as many GPUs.
    """
    rate_rps = steady.load * capacity_rps
    if steady.kind == CONSTANT:
        trace = constant(MIDDLE, rate_rps, steady.duration_s)
    else:
        trace = stationary(MIDDLE, rate_rps, steady.duration_s, seed=2)
    run = run_planner(Scene(trace=trace, num_gpus=steady.num_gpus), steady.num_gpus // 2)
    late = num_switched(run, SETTLED_S)
    last = run.steps[-1]
    return Settled(
        steady=steady,
        split=f"{last.num_prefill}P+{last.num_decode}D",
        switches=run.num_switches,
        settled_per_hour=late * HOUR_S / (steady.duration_s - SETTLED_S),
        attainment=run.attainment,
    )


def num_switched(run: Run, from_s: float) -> int:
    """Role switches from then on; several at one time that cancel out count as none."""
    pairs = zip(run.steps, run.steps[1:], strict=False)
    return sum(abs(now.num_prefill - before.num_prefill) for before, now in pairs if now.time_s >= from_s)


def cost(capacity_rps: float, num_requests: int = COST_REQUESTS) -> Cost:
    rate_rps = _COST_LOAD * capacity_rps
    trace = stationary(MIDDLE, rate_rps, num_requests / rate_rps, seed=3)
    scene = Scene(trace=trace, num_gpus=COST_GPUS)
    planned = run_planner(scene, COST_GPUS // 2)
    last = planned.steps[-1].num_prefill
    return Cost(
        num_requests=len(trace.requests),
        num_gpus=COST_GPUS,
        with_planner_s=planned.cpu_s,
        without_s=run_static(scene, last).cpu_s,
        num_decisions=planned.num_decisions,
        decision_mean_s=planned.decision_mean_s,
        decision_max_s=planned.decision_max_s,
    )


def tables(settled: Sequence[Settled], costs: Cost) -> list[Table]:
    rows = [
        (
            f"{run.steady.kind}, {run.steady.load:.0%}, {run.steady.num_gpus} GPUs, "
            f"{run.steady.duration_s / 60:.0f} min",
            run.split,
            str(run.switches),
            f"**{run.settled_per_hour:.1f}**",
            f"{run.attainment:.1%}",
        )
        for run in settled
    ]
    headers = ["load, GPUs, time", "split at the end", "switches", "an hour, once settled", "attainment"]
    cost_rows = [
        ("requests", f"{costs.num_requests:,}"),
        ("CPU seconds with the planner", f"{costs.with_planner_s:.1f}"),
        ("without, on the split it ends with", f"{costs.without_s:.1f}"),
        ("decisions", str(costs.num_decisions)),
        ("CPU of a decision, mean, ms", f"{1e3 * costs.decision_mean_s:.1f}"),
        ("the longest, ms", f"{1e3 * costs.decision_max_s:.1f}"),
    ]
    return [
        Table(f"Loads that stay: switches, and an hour's after {SETTLED_S:.0f} s", headers, rows),
        Table(f"What the planner costs at {costs.num_gpus} workers", ["", ""], cost_rows),
    ]


def as_json(settled: Sequence[Settled], costs: Cost) -> Mapping[str, Any]:
    return {
        "settled": {
            f"{run.steady.kind}, {run.steady.load:g}, {run.steady.num_gpus}": asdict(run) for run in settled
        },
        "cost": asdict(costs),
    }
