"""The split over time under a load that shifts: planner, oracle and best static split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.planner_cases import CaseResult, case_scene
from benchmarks.planner_runs import WINDOW_S, Run
from simulator.reports.drawing import BLUE, GREEN, GREY, ORANGE

_LOAD_S = 5.0


def plot(outcome: CaseResult, path: Path) -> None:
    """Load, prefill workers and attainment, over one time axis."""
    from matplotlib.figure import Figure

    scene = case_scene(outcome.case, outcome.capacities)
    end_s = scene.trace.duration_s
    arrivals_s = np.array([request.arrival_s for request in scene.trace.requests])
    figure = Figure(figsize=(7.5, 6.2), layout="constrained")
    load, split, met = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.5, 1.2))

    num_bins = int(end_s // _LOAD_S)
    edges_s = np.arange(num_bins + 1) * _LOAD_S
    for name, weights, colour in (
        ("prompt tokens", [request.prompt_tokens for request in scene.trace.requests], ORANGE),
        ("answer tokens", [request.output_tokens for request in scene.trace.requests], BLUE),
    ):
        tokens, _ = np.histogram(arrivals_s, edges_s, weights=np.array(weights, dtype=np.float64))
        load.plot(edges_s[:-1] + _LOAD_S / 2, tokens / _LOAD_S / 1e3, color=colour, label=name)
    load.set(ylabel="thousands a second")
    load.set_title(f"{outcome.case.load}, {outcome.case.num_gpus} GPUs", loc="left", fontsize=11)

    best = outcome.best_static
    lowest = 1.0
    sides = (("oracle", outcome.oracle.run, GREEN), ("planner", outcome.planner, BLUE))
    for name, run, colour in (*sides, (f"best static, {best.name}", best, GREY)):
        label = f"{name}: {run.attainment:.1%} in time"
        split.step(*_prefill_steps(run, end_s), where="post", color=colour, label=label, linewidth=1.8)
        share = _by_window(run, arrivals_s)
        lowest = min(lowest, *share)
        middles_s = (np.arange(len(share)) + 0.5) * WINDOW_S
        met.plot(middles_s, share, color=colour, linewidth=1.5)
    split.set(ylabel="prefill workers", ylim=(-0.3, outcome.case.num_gpus + 0.3))
    met.set(ylabel=f"in time, of {WINDOW_S:.0f} s", xlabel="seconds", xlim=(0, end_s))
    met.set_ylim(max(0.0, lowest - 0.05), 1.01)
    for axes in (load, split, met):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    load.legend(loc="upper right", ncols=2, fontsize=8, frameon=False, bbox_to_anchor=(1, 1.22))
    split.legend(loc="upper center", ncols=3, fontsize=8, frameon=False, bbox_to_anchor=(0.5, 1.17))
    figure.savefig(path, dpi=110)


def _prefill_steps(run: Run, end_s: float) -> tuple[list[float], list[int]]:
    steps = [step for step in run.steps if step.time_s <= end_s]
    times_s = [*(step.time_s for step in steps), end_s]
    return times_s, [*(step.num_prefill for step in steps), steps[-1].num_prefill]


def _by_window(run: Run, arrivals_s: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[float]:
    """Attainment of what arrived in each window."""
    offered = np.bincount((arrivals_s // WINDOW_S).astype(np.int64), minlength=len(run.met_by_window))
    return (run.met_by_window / np.maximum(offered, 1)).tolist()
