"""What `baton simulate` and `baton plan` print of the planner's decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from simulator.planning.planner_run import PlannerRun
from simulator.planning.static_plan import StaticPlan
from simulator.reports.decisions import alternatives_text, gains, moves, what_changed
from simulator.result import SimulationResult

_MAX_ROWS = 20
_NUM_ALTERNATIVES = 3


def planner_line(summary: Mapping[str, Any]) -> str:
    """What the planner did, in one line."""
    planner = summary["planner"]
    per_hour = planner["switches_per_hour"]
    return (
        f"planner: {planner['num_looks']:,} looks, {len(planner['moves'])} decisions to change something, "
        f"{summary['role_switches']} role switches ({per_hour or 0:.1f} an hour); "
        f"{planner['mean_gpus'] or 0:.2f} GPUs on average, "
        f"{summary['goodput_per_gpu_hour'] or 0:,.0f} requests within targets a GPU-hour"
    )


def planner_table(plan: StaticPlan, run: PlannerRun) -> Table:
    """The best static split and the planner, side by side."""
    table = Table(title="the planner on the same GPUs", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in ("attained", "goodput\nreq/s", "goodput a\nGPU-hour", "GPUs\nmean", "role\nswitches"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = (
        (f"best static split: {plan.best.split.label}", plan.best.evaluation.summary),
        (f"planner, from {run.start.label}", run.summary),
    )
    for name, summary in rows:
        gpus = 3600 * summary["gpu_hours"] / summary["simulated_s"]
        table.add_row(
            name,
            f"{100 * (summary['attainment'] or 0):.2f} %",
            f"{summary['goodput_rps'] or 0:.2f}",
            f"{summary['goodput_per_gpu_hour'] or 0:,.0f}",
            f"{gpus:.2f}",
            str(summary["role_switches"]),
        )
    return table


def decisions_table(result: SimulationResult) -> Table:
    """One line for each decision that changed something, the first ones if there are many."""
    table = Table(title="the planner's decisions", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("changes", overflow="fold")
    table.add_column("split", overflow="fold")
    table.add_column("gain\nreq/s", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold")
    table.add_column("looked at:\nattainment (score)", overflow="fold")
    made, gained = moves(result), gains(result.decisions)
    for decision in made[:_MAX_ROWS]:
        gain = gained[decision.number]
        table.add_row(
            f"{decision.at_s:,.1f} s",
            escape(what_changed(decision)),
            escape(decision.split),
            "-" if gain is None else f"{gain:+.2f}",
            escape(decision.reason),
            escape(alternatives_text(decision.alternatives[:_NUM_ALTERNATIVES])),
        )
    if len(made) > _MAX_ROWS:
        table.add_row("", f"... and {len(made) - _MAX_ROWS} more", style="bright_black")
    if not made:
        table.add_row("-", "none", style="bright_black")
    return table
