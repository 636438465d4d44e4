"""Tables of the planner's decisions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

Decision = Mapping[str, Any]
"""One entry of ``decisions`` in a router's /baton/planner."""

_VERDICT_STYLE = {"move": "bold green", "blind": "yellow"}
_NUM_INPUTS = 4
"""Shown in a line of the history; a decision's own page shows all."""


def history_table(decisions: Sequence[Decision], mode: str) -> Table:
    """One line a decision."""
    table = Table(title=f"decisions, mode {mode}", title_justify="left")
    table.add_column("#", justify="right")
    for heading in ("time", "verdict", "split", "changes", "reason", "inputs"):
        table.add_column(heading, overflow="fold")
    for decision in decisions:
        verdict = decision["verdict"]
        table.add_row(
            str(decision["number"]),
            clock_time(decision["at_s"]),
            verdict + _what_came_of_it(decision, mode),
            escape(decision["split"]) or "-",
            _summary(decision),
            escape(decision["reason"]),
            ", ".join(
                f"{name} {_figure(value)}" for name, value in list(decision["inputs"].items())[:_NUM_INPUTS]
            ),
            style=_VERDICT_STYLE.get(verdict),
        )
    return table


def inputs_table(decision: Decision) -> Table:
    """What one decision was made from."""
    table = Table(title=f"inputs of decision {decision['number']}", title_justify="left")
    table.add_column("input")
    table.add_column("value", justify="right")
    for name, value in decision["inputs"].items():
        table.add_row(name, _figure(value))
    return table


def alternatives_table(decision: Decision) -> Table:
    """The splits that one decision was chosen from, best first."""
    table = Table(title="alternatives", title_justify="left")
    table.add_column("split")
    for heading in ("GPUs", "predicted attainment", "score"):
        table.add_column(heading, justify="right")
    for each in decision["alternatives"]:
        attainment = each["attainment"]
        table.add_row(
            escape(each["split"]),
            _figure(each["num_gpus"]),
            "-" if attainment is None else f"{100 * attainment:.1f}%",
            _figure(each["score"]),
            style="bold green" if each["split"] == decision["split"] else None,
        )
    return table


def factors_table(factors: Sequence[Mapping[str, Any]]) -> Table:
    """How far the profiles are off, as learned."""
    table = Table(title="step times over the profile's", title_justify="left")
    for heading in ("shape", "role", "phase"):
        table.add_column(heading)
    table.add_column("factor", justify="right")
    for each in factors:
        table.add_row(each["shape"], each["role"], each["phase"], f"{each['factor']:.2f}")
    return table


def changes(decision: Decision) -> Iterator[str]:
    """Each change that one decision asked for, and what failed."""
    for change in decision["role_changes"]:
        yield f"{change['worker_id']} becomes a {change['role']} worker"
    for shape, num_workers in decision["counts"].items():
        yield f"{shape}: {num_workers} workers"
    for failure in decision["failures"]:
        yield f"failed: {failure}"


def status_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """How the planner does."""
    yield (
        f"model {answer['model']}, mode {answer['mode']}, a decision every {answer['interval_s']:g} s,"
        f" since {clock_time(answer['started_at_s'])}"
    )
    if answer["trouble"]:
        age_s = answer["observation_age_s"]
        yield f"holds: {answer['trouble']} (the cluster was last seen {age_s:.1f} s ago)"
    for decision in answer["decisions"]:
        yield (
            f"decision {decision['number']} at {clock_time(decision['at_s'])}: {decision['verdict']}"
            f"{_what_came_of_it(decision, answer['mode'])}, split {decision['split'] or '-'};"
            f" {decision['reason']} ({1000 * decision['cpu_s']:.1f} ms of CPU)"
        )


def clock_time(at_s: float) -> str:
    """A wall-clock time in this machine's zone."""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(at_s))


def _what_came_of_it(decision: Decision, mode: str) -> str:
    if decision["verdict"] != "move":
        return ""
    if decision["failures"]:
        return " (in part)"
    return "" if decision["carried_out"] or mode == "auto" else " (advised)"


def _summary(decision: Decision) -> str:
    roles = Counter(change["role"] for change in decision["role_changes"])
    parts = [f"{num} to {role}" for role, num in sorted(roles.items())]
    parts += [f"{escape(shape)} x {num}" for shape, num in decision["counts"].items()]
    return ", ".join(parts) or "-"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
