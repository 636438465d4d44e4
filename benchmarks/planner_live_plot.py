"""The live planner benchmark over time: the split, TTFT and TPOT."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.planner_live import LiveRun
from benchmarks.planner_live_setup import NUM_WORKERS, SLO
from simulator.reports.drawing import BLUE, GREY, ORANGE, RED

_MOST_TARGETS = 3.0
"""Height of a panel, in multiples of the target."""


def plot(run: LiveRun, path: Path) -> None:
    """Three panels over one time axis; the simulator's split is dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.6), layout="constrained")
    split, ttft, tpot = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.2, 1.2))
    start_s, load = run.replayed.start_s, run.load

    samples = [sample for sample in run.replayed.splits if sample.at_s - start_s <= load.seconds]
    split.step(
        [sample.at_s - start_s for sample in samples],
        [sample.num_prefill for sample in samples],
        where="post", color=BLUE, linewidth=2, label="live",
    )  # fmt: skip
    timeline = run.simulated.timeline
    shown = timeline.time_s <= load.seconds
    split.step(
        timeline.time_s[shown], timeline.num_prefill_workers[shown],
        where="post", color=ORANGE, linewidth=1.6, linestyle="--", label="simulated",
    )  # fmt: skip
    split.set(ylabel=f"prefill workers of {NUM_WORKERS}", ylim=(-0.2, NUM_WORKERS + 0.2))
    split.set_yticks(range(NUM_WORKERS + 1))

    arrivals_s = np.array(load.arrivals_s)
    outcomes = run.replayed.outcomes
    for axes, values, target_s, name in (
        (ttft, np.array([outcome.ttft_s for outcome in outcomes]), SLO.ttft_s, "TTFT (s)"),
        (tpot, np.array([outcome.tpot_s for outcome in outcomes]), SLO.tpot_s, "TPOT (s)"),
    ):
        axes.scatter(arrivals_s, values, s=5, color=BLUE, alpha=0.5, linewidths=0, label="a live request")
        axes.axhline(target_s, color=RED, linewidth=1, linestyle=":", label="target")
        axes.set(ylabel=name, ylim=(0, _MOST_TARGETS * target_s))
        if num_above := int((values > _MOST_TARGETS * target_s).sum()):
            axes.text(0.01, 0.93, f"{num_above} above", transform=axes.transAxes, fontsize=8, color=GREY)
    tpot.set(xlabel="seconds, by arrival", xlim=(0, load.seconds))

    turn_s = 0.0
    for phase in load.phases:
        split.text(
            turn_s + phase.seconds / 2, NUM_WORKERS + 0.35, phase.name, ha="center", va="bottom", fontsize=9
        )
        turn_s += phase.seconds
        for axes in (split, ttft, tpot):
            axes.axvline(turn_s, color=GREY, linewidth=0.8)
    for axes in (split, ttft, tpot):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    split.legend(loc="lower right", ncols=2, fontsize=8, framealpha=0.9)
    ttft.legend(loc="upper right", ncols=2, fontsize=8, framealpha=0.9, markerscale=3)
    figure.savefig(path, dpi=110)
