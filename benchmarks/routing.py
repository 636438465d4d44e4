"""Routing policies side by side on public traces, beside a bound that no policy exceeds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.routing_runs import SLO, TRACE_FILES, Case, Figures, Results, run, traces_folder
from benchmarks.table import Table
from router.policies import POLICY_NAMES

OURS = "predictive"
ROUND_ROBIN = "round_robin"
PLAIN = tuple(sorted(set(POLICY_NAMES) - {OURS}))
SHOWN_WORKERS = 16
_MORE_REQUESTS = {"Azure conversation": 3}
_NUM_PROCESSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is simulated: every policy on every trace, at every size and load."""

    num_requests: dict[int, int]
    """By number of workers; three times as many of Azure's, which are short."""
    loads: tuple[float, ...]
    router_loads: tuple[float, ...]
    num_routers: tuple[int, ...] = (1, 2, 4)


FULL = Grid(
    num_requests={4: 1200, 8: 1800, 16: 2500, 64: 5000},
    loads=(0.5, 0.8, 1.0, 1.2, 1.4),
    router_loads=(0.8, 1.0),
)
QUICK = Grid(num_requests={16: 800}, loads=(0.8, 1.2), router_loads=(0.8,), num_routers=(1, 2))


def measure(grid: Grid, progress: Callable[[str], None]) -> dict[Case, Figures]:
    """Runs all cases on two processes.

    Raises:
        FileNotFoundError: a trace is missing.
    """
    traces_folder()
    cases = [*policy_cases(grid), *router_cases(grid)]
    # Long ones first, so that both processes end together.
    cases = sorted(dict.fromkeys(cases), key=lambda case: -case.num_requests * case.num_workers)
    results = {}
    with ProcessPoolExecutor(_NUM_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, case): case for case in cases}
        for number, future in enumerate(as_completed(futures), 1):
            results[futures[future]] = future.result()
            progress(f"{number} of {len(cases)} simulations")
    return {case: results[case] for case in sorted(cases, key=_order)}


def policy_cases(grid: Grid) -> list[Case]:
    return [
        Case(
            trace=trace,
            num_workers=num_workers,
            load=load,
            policy=policy,
            num_requests=num_requests * _MORE_REQUESTS.get(trace, 1),
            with_bound=policy == OURS,
        )
        for trace in TRACE_FILES
        for num_workers, num_requests in grid.num_requests.items()
        for load in grid.loads
        for policy in POLICY_NAMES
    ]


def router_cases(grid: Grid) -> list[Case]:
    return [
        Case(
            trace=trace,
            num_workers=SHOWN_WORKERS,
            load=load,
            policy=OURS,
            num_requests=grid.num_requests[SHOWN_WORKERS] * _MORE_REQUESTS.get(trace, 1),
            num_routers=num_routers,
            with_bound=num_routers == 1,
        )
        for trace in TRACE_FILES
        for load in grid.router_loads
        for num_routers in grid.num_routers
    ]


def tables(results: Results, grid: Grid) -> list[Table]:
    ours = [case for case in policy_cases(grid) if case.policy == OURS]
    shown = [case for case in ours if case.num_workers == SHOWN_WORKERS]
    return [
        _goodput(results, ours),
        _losses(results, ours),
        _routers(results, grid),
        *(_details(results, [case for case in shown if case.trace == trace]) for trace in TRACE_FILES),
    ]


def _goodput(results: Results, ours: Sequence[Case]) -> Table:
    rows = []
    for case in ours:
        own, bound = results[case], results[case].bound
        assert bound is not None
        plain = {name: results[_as(case, name)].goodput_rps for name in PLAIN}
        rows.append(
            (
                _where(case),
                *(_rps(plain[name]) for name in PLAIN),
                f"**{_rps(own.goodput_rps)}**",
                _ratio(own.goodput_rps, plain[ROUND_ROBIN]),
                _ratio(own.goodput_rps, max(plain.values())),
                _rps(bound.attainment * own.num_requests / own.duration_s),
                f"{own.attainment / bound.attainment:.0%}",
            )
        )
    headers = ["trace, workers, load", *PLAIN, OURS, "to round_robin", "to the best other"]
    title = (
        f"Goodput: requests a second within {1e3 * SLO.ttft_s:.0f} ms TTFT and {1e3 * SLO.tpot_s:.0f} ms TPOT"
    )
    return Table(title, [*headers, "bound", "of the bound"], rows)


def _losses(results: Results, ours: Sequence[Case]) -> Table:
    rows = []
    for case in ours:
        own, bound = results[case], results[case].bound
        assert bound is not None
        rows.append(
            (
                _where(case),
                f"{bound.attainment:.1%}",
                _points(bound.with_own_caches - bound.attainment),
                _points(own.ttft_attainment - bound.with_own_caches),
                _points(own.attainment - own.ttft_attainment),
                f"**{own.attainment:.1%}**",
            )
        )
    headers = ["trace, workers, load", "bound", "caches", "queues", "decode", "attained"]
    return Table(f"What {OURS} loses against the bound: share of requests within both targets", headers, rows)


def _routers(results: Results, grid: Grid) -> Table:
    rows = []
    for case in router_cases(grid):
        if case.num_routers > 1:
            continue
        many = [results[replace(case, num_routers=n, with_bound=False)] for n in grid.num_routers if n > 1]
        one = results[case]
        rows.append(
            (
                _where(case),
                _rps(one.goodput_rps),
                *(f"{_rps(f.goodput_rps)} ({f.goodput_rps / one.goodput_rps - 1:+.1%})" for f in many),
            )
        )
    headers = ["trace, workers, load", *(f"{n} router{'s'[: n - 1]}" for n in grid.num_routers)]
    return Table(f"Goodput of {OURS} by routers", headers, rows)


def _details(results: Results, ours: Sequence[Case]) -> Table:
    rows = []
    for case in ours:
        for policy in (*PLAIN, OURS):
            own = results[_as(case, policy)]
            rows.append(
                (
                    f"{case.load:g}, {policy}",
                    f"{own.attainment:.1%}",
                    *(f"{1e3 * seconds:,.0f}" for seconds in own.ttft_s),
                    *(f"{1e3 * seconds:,.1f}" for seconds in own.tpot_s),
                    f"{own.cached_share:.1%}",
                )
            )
    latencies = [f"{name} {percent}" for name in ("TTFT", "TPOT") for percent in ("p50", "p90", "p99")]
    title = f"{ours[0].trace}, {ours[0].num_workers} workers, times in ms"
    return Table(title, ["load, policy", "attainment", *latencies, "cached"], rows)


def as_json(results: Results) -> dict[str, str]:
    """Every case by its settings, in a line each: there are hundreds."""
    return {
        f"{_where(case)}, {case.policy}, {case.num_routers} routers": (
            f"attainment {own.attainment:.4f}, goodput {_rps(own.goodput_rps)} a second, "
            f"TTFT p50 p90 p99 {_ms(own.ttft_s)} ms, TPOT {_ms(own.tpot_s)} ms, cached {own.cached_share:.3f}"
        )
        for case, own in results.items()
    }


def _as(case: Case, policy: str) -> Case:
    return replace(case, policy=policy, with_bound=policy == OURS)


def _order(case: Case) -> tuple[Any, ...]:
    traces: Iterable[str] = TRACE_FILES
    return (
        case.num_routers,
        list(traces).index(case.trace),
        case.num_workers,
        case.load,
        POLICY_NAMES.index(case.policy),
    )


def _where(case: Case) -> str:
    return f"{case.trace}, {case.num_workers}, {case.load:g}"


def _rps(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else "-"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _ms(seconds: Iterable[float]) -> str:
    return " ".join(f"{1e3 * second:.1f}" for second in seconds)
