"""The planner against every static split and against an oracle, in the simulator."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import planner_published, planner_stability
from benchmarks.planner_capacity import mix_capacity_rps
from benchmarks.planner_cases import Case, CaseResult, capacity_names, capacity_of, run_case
from benchmarks.planner_loads import BURSTY, LOADS, MIDDLE, PHASE_SHIFT, TRACE_LOAD, TRACES
from benchmarks.planner_published import Published
from benchmarks.planner_runs import Run, figures
from benchmarks.planner_stability import CONSTANT, POISSON, Cost, Settled, Steady
from benchmarks.routing_runs import SLO, traces_folder
from benchmarks.table import Table

SHOWN_GPUS = 8
"""Of the plot."""
_MIDDLE = "middle"
_NUM_PROCESSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is simulated."""

    loads: tuple[str, ...]
    most_recorded: int
    """Requests of a recorded trace: what would have more ends earlier."""
    durations_s: Mapping[int, float]
    """By GPUs."""
    budgets: Mapping[int, int]
    """Schedules the oracle may try, by GPUs."""
    published: tuple[tuple[int, bool], ...]
    """Periods, and whether there is admission control."""
    steady_s: Mapping[int, float]
    steady_loads: tuple[float, ...] = planner_stability.LOADS
    cost_requests: int = planner_stability.COST_REQUESTS

    def cases(self) -> list[Case]:
        return [
            Case(load=load, num_gpus=num_gpus, duration_s=duration_s, budget=self.budgets[num_gpus])
            for load in self.loads
            for num_gpus, duration_s in self.durations_s.items()
        ]

    def steady(self) -> list[Steady]:
        return [
            Steady(kind=kind, load=load, num_gpus=num_gpus, duration_s=duration_s)
            for kind in (CONSTANT, POISSON)
            for num_gpus, duration_s in self.steady_s.items()
            for load in self.steady_loads
        ]


FULL = Grid(
    loads=LOADS,
    most_recorded=20_000,
    durations_s={4: 300.0, 8: 240.0, 16: 180.0, 64: 120.0},
    budgets={4: 8, 8: 6, 16: 4, 64: 3},
    published=((1, True), (1, False)),
    steady_s={4: 1800.0, 8: 300.0, 16: 240.0, 64: 180.0},
)
QUICK = Grid(
    loads=(PHASE_SHIFT, BURSTY),
    most_recorded=5_000,
    durations_s={4: 240.0},
    budgets={4: 4},
    published=((1, False),),
    steady_s={4: 600.0},
    steady_loads=(0.6,),
    cost_requests=6_000,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything measured."""

    outcomes: list[CaseResult]
    published: list[Published]
    settled: list[Settled]
    cost: Cost


def measure(grid: Grid, progress: Callable[[str], None]) -> Results:
    """Runs everything on two processes.

    Raises:
        FileNotFoundError: a trace is missing.
    """
    if any(load in TRACES for load in grid.loads):
        traces_folder()
    with ProcessPoolExecutor(_NUM_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        try:
            return _measure(grid, pool, progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _measure(grid: Grid, pool: ProcessPoolExecutor, progress: Callable[[str], None]) -> Results:
    cases, steady = grid.cases(), grid.steady()
    names = {(name, case.num_gpus) for case in cases for name in capacity_names(case.load)}
    middle = {(_MIDDLE, num_gpus) for num_gpus in (*grid.steady_s, planner_stability.COST_GPUS)}
    wanted = sorted(names | middle)
    capacities = _all({key: pool.submit(_capacity, *key) for key in wanted}, progress, "capacities")
    cases = [_limited(case, grid.most_recorded, capacities) for case in cases]
    # Long ones first, so that both processes end together.
    long_first = sorted(cases, key=lambda case: -case.num_gpus * case.duration_s)
    runs: dict[Any, Future[Any]] = {
        case: pool.submit(
            run_case, case, {name: capacities[name, case.num_gpus] for name in capacity_names(case.load)}
        )
        for case in long_first
    }
    for published in grid.published:
        runs[published] = pool.submit(planner_published.measure, *published)
    for load in steady:
        runs[load] = pool.submit(planner_stability.settle, load, capacities[_MIDDLE, load.num_gpus])
    cost_capacity = capacities[_MIDDLE, planner_stability.COST_GPUS]
    runs["cost"] = pool.submit(planner_stability.cost, cost_capacity, grid.cost_requests)
    done = _all(runs, progress, "cases")
    return Results(
        outcomes=[done[case] for case in cases],
        published=[done[published] for published in grid.published],
        settled=[done[load] for load in steady],
        cost=done["cost"],
    )


def _limited(case: Case, most_requests: int, capacities: Mapping[tuple[str, int], float]) -> Case:
    """A recorded trace of short requests ends earlier: what it has to show comes again and again."""
    if case.load not in TRACES:
        return case
    rate_rps = TRACE_LOAD * capacities[case.load, case.num_gpus]
    return replace(case, duration_s=min(case.duration_s, most_requests / rate_rps))


def _all(futures: Mapping[Any, Future[Any]], progress: Callable[[str], None], what: str) -> dict[Any, Any]:
    for number, future in enumerate(as_completed(futures.values()), 1):
        future.result()
        progress(f"{number} of {len(futures)} {what}")
    return {key: future.result() for key, future in futures.items()}


def _capacity(name: str, num_gpus: int) -> float:
    return mix_capacity_rps(MIDDLE, num_gpus) if name == _MIDDLE else capacity_of(name, num_gpus)


def tables(results: Results) -> list[Table]:
    return [
        _goodput(results.outcomes),
        _splits(results.outcomes),
        *(_details([o for o in results.outcomes if o.case.num_gpus == size]) for size in _sizes(results)),
        *planner_published.tables(results.published),
        *planner_stability.tables(results.settled, results.cost),
    ]


def _sizes(results: Results) -> list[int]:
    return sorted({outcome.case.num_gpus for outcome in results.outcomes})


def _goodput(outcomes: Sequence[CaseResult]) -> Table:
    rows = []
    for outcome in outcomes:
        best, own, oracle = outcome.best_static, outcome.planner, outcome.oracle.run
        disaggregated = max(
            (run for num_prefill, run in outcome.statics.items() if num_prefill),
            key=lambda run: run.num_met,
        )
        rows.append(
            (
                _where(outcome),
                f"{outcome.offered_rps:.1f}",
                f"{best.goodput_rps:.1f} ({best.name})",
                f"{disaggregated.goodput_rps:.1f} ({disaggregated.name})",
                f"**{own.goodput_rps:.1f}**",
                f"{oracle.goodput_rps:.1f}",
                f"{own.num_met / best.num_met:.3f}",
                f"**{own.num_met / oracle.num_met:.3f}**",
                f"{oracle.num_met / best.num_met:.3f}",
                f"{outcome.oracle.num_simulations}, {outcome.oracle.found_by}",
            )
        )
    headers = [
        "load, GPUs, s", "offered a second", "best static", "best with prefill workers", "planner", "oracle",
        "planner to static", "planner to oracle", "oracle to static", "oracle's simulations, best by",
    ]  # fmt: skip
    targets = f"{1e3 * SLO.ttft_s:.0f} ms TTFT and {1e3 * SLO.tpot_s:.0f} ms TPOT"
    return Table(f"Goodput: requests a second within {targets}", headers, rows)


def _splits(outcomes: Sequence[CaseResult]) -> Table:
    rows = [
        (_where(outcome), ", ".join(f"{name}: {run.attainment:.1%}" for name, run in outcome.statics.items()))
        for outcome in outcomes
    ]
    headers = ["load, GPUs, s", "attainment of static splits, by prefill workers"]
    return Table("Every static split (of more than 8 GPUs those that were searched)", headers, rows)


def _details(outcomes: Sequence[CaseResult]) -> Table:
    rows = []
    for outcome in outcomes:
        for side, run in (
            (f"best static, {outcome.best_static.name}", outcome.best_static),
            ("planner", outcome.planner),
            ("oracle", outcome.oracle.run),
        ):
            rows.append((f"{outcome.case.load}, {side}", *_cells(run, outcome.oracle.run)))
    latencies = [f"{name} {percent}" for name in ("TTFT", "TPOT") for percent in ("p50", "p90", "p99")]
    headers = [
        "load, side", "attainment", "regret", "goodput a GPU-hour", *latencies, "worst minute",
        "switches an hour",
    ]  # fmt: skip
    return Table(f"{outcomes[0].case.num_gpus} GPUs, times in ms", headers, rows)


def _cells(run: Run, oracle: Run) -> tuple[str, ...]:
    return (
        f"{run.attainment:.1%}",
        f"{1 - run.num_met / oracle.num_met:.1%}",
        f"{run.goodput_per_gpu_hour:,.0f}",
        *(f"{value:,.0f}" for value in run.ttft_ms),
        *(f"{value:.1f}" for value in run.tpot_ms),
        "-" if math.isnan(run.worst_minute) else f"{run.worst_minute:.1%}",
        f"{run.switches_per_hour:.0f}",
    )


def as_json(results: Results) -> dict[str, Any]:
    return {
        "cases": {
            _where(outcome): {
                "capacities_rps": dict(outcome.capacities),
                "offered_rps": outcome.offered_rps,
                "statics": {run.name: run.attainment for run in outcome.statics.values()},
                "best_static": figures(outcome.best_static),
                "planner": figures(outcome.planner),
                "oracle": figures(outcome.oracle.run),
                "oracle_simulations": outcome.oracle.num_simulations,
            }
            for outcome in results.outcomes
        },
        "published": {
            f"{case.num_periods} periods, {'admission' if case.admission else 'no admission'}": (
                planner_published.as_json(case)
            )
            for case in results.published
        },
        "stability": planner_stability.as_json(results.settled, results.cost),
    }


def shown(results: Results) -> CaseResult | None:
    """The case of the plot."""
    shifts = [outcome for outcome in results.outcomes if outcome.case.load == PHASE_SHIFT]
    return next((outcome for outcome in shifts if outcome.case.num_gpus == SHOWN_GPUS), None)


def _where(outcome: CaseResult) -> str:
    case = outcome.case
    return f"{case.load}, {case.num_gpus}, {case.duration_s:.0f}"
