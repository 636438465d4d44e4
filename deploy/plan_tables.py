"""Tables of a static plan: the best split, how it was found, and the GPUs that targets take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from simulator.planning.search import GpusNeeded, Score, Tried
from simulator.planning.split import Split
from simulator.planning.static_plan import StaticPlan

_MAX_ROWS = 24


def plan_view(plan: StaticPlan) -> RenderableType:
    """The whole plan for the terminal."""
    parts: list[RenderableType] = [summary_lines(plan), search_table(plan)]
    if plan.needed:
        parts.append(needed_table(plan.needed))
    return Group(*parts)


def summary_lines(plan: StaticPlan) -> str:
    """The answer in a few lines of markup."""
    best, slo = plan.best, plan.slo
    part = ""
    if plan.window_s is not None:
        start_s, end_s = plan.window_s
        part = f", busiest window: {start_s / 60:.1f} to {end_s / 60:.1f} min"
    lines = [
        f"trace {escape(plan.trace_name)}: {plan.num_requests} requests{part}",
        f"SLO: TTFT {1e3 * slo.ttft_s:g} ms, TPOT {1e3 * slo.tpot_s:g} ms",
        f"[bold]best split of {plan.num_gpus} GPUs: {best.split.label}[/bold] ({_workers(best.split)})",
        f"attainment {_percent(best.score.attainment)}, goodput {best.score.goodput_rps:.2f} requests/s, "
        f"TTFT p90 {_milliseconds(best.score.ttft_p90_s)}",
    ]
    if plan.ceiling.reason:
        lines.append(f"[yellow]{escape(plan.ceiling.reason)}[/yellow]")
    how = "every split was simulated" if plan.num_simulated == plan.num_candidates else _saved(plan)
    lines.append(f"{how}; {len(plan.tried)} simulations in all")
    return "\n".join(lines) + "\n"


def search_table(plan: StaticPlan) -> Table:
    """One line for each simulation of the budget, in order, then the splits left out."""
    table = Table(title=f"splits of {plan.num_gpus} GPUs", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("#", "split", "estimated", "attained", "goodput\nreq/s", "TTFT\np90", "p99 of\nSLO"):
        table.add_column(heading, justify="left" if heading == "split" else "right", no_wrap=True)
    table.add_column("why it was simulated")
    tried = {one.split: one for one in plan.tried}
    of_budget = {split for split, _ in plan.candidates}
    for number, one in enumerate(plan.tried, start=1):
        if one.split in of_budget:
            style = "bold green" if one is plan.best else ""
            table.add_row(str(number), *_cells(one, _named(one.split, plan)), one.why, style=style)
    left_out = [(split, estimate) for split, estimate in plan.candidates if split not in tried]
    for split, estimate in left_out[:_MAX_ROWS]:
        cells = _named(split, plan), _percent(estimate.attainment), *["-"] * 4
        table.add_row("-", *cells, "not simulated", style="bright_black")
    if len(left_out) > _MAX_ROWS:
        table.add_row("", f"... and {len(left_out) - _MAX_ROWS} more", style="bright_black")
    return table


def needed_table(needed: Sequence[GpusNeeded]) -> Table:
    """One line for each target."""
    table = Table(title="GPUs needed", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("target", justify="right")
    table.add_column("GPUs", justify="right")
    table.add_column("best split")
    table.add_column("attained", justify="right")
    table.add_column("note")
    for one in needed:
        attained = _percent(one.best.score.attainment) if one.best else "-"
        split = f"{one.best.split.label}" if one.best else "-"
        if one.num_gpus is None:
            note = f"not reachable: {escape(one.reason)}"
            table.add_row(_target(one.target), "[red]none[/red]", split, attained, note)
        else:
            table.add_row(_target(one.target), str(one.num_gpus), split, attained, "")
    return table


def _cells(one: Tried, name: str) -> tuple[str, ...]:
    score: Score = one.score
    return (
        name,
        _percent(one.estimate.attainment),
        _percent(score.attainment),
        f"{score.goodput_rps:.2f}",
        _milliseconds(score.ttft_p90_s),
        f"{100 * score.slo_use:.0f} %" if math.isfinite(score.slo_use) else "-",
    )


def _named(split: Split, plan: StaticPlan) -> str:
    """The label; with profiles of one TP size also their names."""
    alike = [other for other, _ in plan.candidates if other.label == split.label]
    if len(alike) == 1:
        return split.label
    return f"{split.label}\n{escape(split.prefill_profile.name)}\n{escape(split.decode_profile.name)}"


def _workers(split: Split) -> str:
    decode = f"{split.num_decode} x {escape(split.decode_profile.name)}"
    if not split.num_prefill:
        return f"{decode}; each prefills for itself, no disaggregation"
    return f"prefill {split.num_prefill} x {escape(split.prefill_profile.name)}, decode {decode}"


def _saved(plan: StaticPlan) -> str:
    return (
        f"{plan.num_simulated} of {plan.num_candidates} splits were simulated, the others have worse "
        f"estimates or lie behind a worse neighbour"
    )


def _percent(share: float) -> str:
    """Never 100 % of what is less."""
    shown = math.floor(share * 1e4) / 100
    return f"{shown:.2f} %"


def _target(share: float) -> str:
    return f"{100 * share:g} %"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if math.isfinite(seconds) else "-"
