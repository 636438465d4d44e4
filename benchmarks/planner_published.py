"""The published case: an 8B model on H200, a rate that swings from 5 to 45 requests a second, tight targets.

Prompts of 3000 tokens and answers of 300; each varies by up to a fifth, drawn uniformly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.planner_runs import Run, Scene, figures, planner_settings, run_planner, run_static
from benchmarks.table import Table
from simulator.result import Slo
from simulator.traces.draws import Sinusoid, UniformLengths
from simulator.traces.generators import Independent, generate
from simulator.traces.trace import Trace

SLO = Slo(ttft_s=0.2, tpot_s=0.01)
PERIOD_S = 600.0
LOW_RPS, HIGH_RPS = 5.0, 45.0
FLOOR, SMALL, MOST = 2, 4, 8
"""GPUs: the planner's least, the static cluster's, the planner's most."""
_ENOUGH = 0.99


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Published:
    """Runs of one trace."""

    num_periods: int
    admission: bool
    """On every side, or on none."""
    static: Run
    """The published split, 2P+2D."""
    best_small: Run
    best_large: Run
    planner: Run
    planner_instant: Run
    """With workers that start at once."""
    instant_goodput_rps: float
    instant_gpus: float | None
    """If every window had the best split of at most eight GPUs, and of those good enough the smallest: put
    together from the static runs, not simulated. None if that was not asked for."""


def trace(num_periods: int, seed: int = 1) -> Trace:
    load = Independent(
        arrivals=Sinusoid(low_rps=LOW_RPS, high_rps=HIGH_RPS, period_s=PERIOD_S),
        duration_s=num_periods * PERIOD_S,
        prompt=UniformLengths(low=2400, high=3600),
        output=UniformLengths(low=240, high=360),
    )
    return generate(load, seed, name="published")


def measure(num_periods: int, admission: bool) -> Published:
    scene = Scene(trace=trace(num_periods), num_gpus=SMALL, slo=SLO, admission=admission)
    # All sizes, which cost most of the time, tell what instant moves would give. Where nobody is refused,
    # what one window leaves behind on a static split would spoil the next one's figures.
    with_instant = num_periods == 1 and admission
    runs = {
        (num_gpus, num_prefill): run_static(scene, num_prefill, num_gpus)
        for num_gpus in (range(FLOOR, MOST + 1) if with_instant else (SMALL, MOST))
        for num_prefill in range(num_gpus)
    }
    settings = planner_settings(SLO, least=FLOOR, most=MOST)
    at_once = planner_settings(SLO, least=FLOOR, most=MOST, startup_s=0.0)
    instant_met, instant_gpus = _instant([(size, run) for (size, _), run in runs.items()])
    return Published(
        num_periods=num_periods,
        admission=admission,
        static=runs[SMALL, SMALL // 2],
        best_small=_best(run for (size, _), run in runs.items() if size == SMALL),
        best_large=_best(run for (size, _), run in runs.items() if size == MOST),
        planner=run_planner(scene, SMALL // 2, settings),
        planner_instant=run_planner(scene, SMALL // 2, at_once),
        instant_goodput_rps=instant_met / scene.trace.duration_s,
        instant_gpus=instant_gpus if with_instant else None,
    )


def _best(runs: Iterable[Run]) -> Run:
    return max(runs, key=lambda run: run.num_met)


def _instant(runs: Sequence[tuple[int, Run]]) -> tuple[int, float]:
    """Requests in time and mean GPUs, window by window of the static runs: nobody's moves take any time."""
    met = np.array([run.met_by_window for _, run in runs])
    most = met.max(axis=0)
    sizes = np.array([[size] for size, _ in runs])
    enough = np.where(met >= _ENOUGH * most, sizes, MOST)
    return int(most.sum()), float(enough.min(axis=0).mean())


def tables(cases: Sequence[Published]) -> list[Table]:
    return [_table(case) for case in cases]


def _table(case: Published) -> Table:
    base = case.static
    named = (
        (f"{SMALL} GPUs, {base.name}", base),
        (f"{SMALL} GPUs, best static: {case.best_small.name}", case.best_small),
        (f"{MOST} GPUs, best static: {case.best_large.name}", case.best_large),
        (f"planner, {FLOOR} to {MOST} GPUs", case.planner),
        ("planner, workers that start at once", case.planner_instant),
    )
    rows = [
        (
            name,
            f"{run.mean_gpus:.2f}",
            f"{run.attainment:.1%}",
            _against(run.goodput_rps, base.goodput_rps),
            _against(run.goodput_rps / run.mean_gpus, base.goodput_rps / base.mean_gpus),
            *(f"{value:,.0f}" for value in run.ttft_ms),
            *(f"{value:.1f}" for value in run.tpot_ms),
            f"{run.switches_per_hour:.0f}",
        )
        for name, run in named
    ]
    if (gpus := case.instant_gpus) is not None:
        goodput_rps = case.instant_goodput_rps
        rows.append(
            (
                "each 15 s its best static split, no moves",
                f"{gpus:.2f}",
                f"{goodput_rps / base.goodput_rps * base.attainment:.1%}",
                _against(goodput_rps, base.goodput_rps),
                _against(goodput_rps / gpus, base.goodput_rps / base.mean_gpus),
                *["-"] * 7,
            )
        )
    latencies = [f"{name} {percent}" for name in ("TTFT", "TPOT") for percent in ("p50", "p90", "p99")]
    headers = ["", "GPUs", "attainment", "goodput", "goodput a GPU", *latencies, "switches an hour"]
    seconds = case.num_periods * PERIOD_S
    control = "with admission control" if case.admission else "everybody is let in"
    return Table(f"5 to 45 requests a second, {seconds:.0f} s, {control}: times in ms", headers, rows)


def _against(value: float, base: float) -> str:
    return f"{value:.2f} ({value / base - 1:+.0%})"


def as_json(case: Published) -> dict[str, Any]:
    runs = {
        "static": case.static,
        "best_small": case.best_small,
        "best_large": case.best_large,
        "planner": case.planner,
        "planner_instant": case.planner_instant,
    }
    instant = {"goodput_rps": case.instant_goodput_rps, "gpus": case.instant_gpus}
    return {"instant": instant, **{name: figures(run) for name, run in runs.items()}}
