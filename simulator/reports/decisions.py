"""The planner's decisions of a run, in figures and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.decision import Alternative, PlanDecision
from simulator.result import SimulationResult

MAX_ALTERNATIVES = 4
"""Listed with a decision."""


def planner_figures(result: SimulationResult) -> dict[str, Any]:
    """Part of the summary: how often the planner looked, what it changed, and what that led to."""
    hours = result.simulated_s / 3600
    verdicts = [decision.verdict.value for decision in result.decisions]
    return {
        "num_looks": len(result.decisions),
        "verdicts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
        "switches_per_hour": result.num_role_switches / hours if hours else None,
        "mean_gpus": result.gpu_seconds / result.simulated_s if result.simulated_s else None,
        "moves": [move_figures(decision) for decision in moves(result)],
    }


def moves(result: SimulationResult) -> list[PlanDecision]:
    """The decisions that changed something."""
    return [decision for decision in result.decisions if decision.changes_something]


def move_figures(decision: PlanDecision) -> dict[str, Any]:
    """One decision, ready for JSON."""
    return {
        "at_s": float(decision.at_s),
        "reason": decision.reason,
        "split": decision.split,
        "role_changes": [
            {"worker_id": change.worker_id, "shape": change.shape, "role": change.role.value}
            for change in decision.role_changes
        ],
        "counts": dict(decision.counts),
        "inputs": {name: float(value) for name, value in decision.inputs.items()},
        "alternatives": [
            {
                "split": one.split,
                "num_gpus": float(one.num_gpus),
                "attainment": float(one.attainment),
                "score": float(one.score),
            }
            for one in decision.alternatives
        ],
    }


def what_changed(decision: PlanDecision) -> str:
    """Such as ``3 x h200 to decode, h200: 8 workers``."""
    kinds: dict[tuple[str, str], int] = {}
    for change in decision.role_changes:
        kind = change.shape, change.role.value
        kinds[kind] = kinds.get(kind, 0) + 1
    parts = [f"{count} x {shape} to {role}" for (shape, role), count in kinds.items()]
    parts += [f"{shape}: {count} workers" for shape, count in decision.counts.items()]
    return ", ".join(parts)


def gain(decision: PlanDecision, before: str | None) -> float | None:
    """Requests per second within both targets that it expects over staying; None if it does not say.

    Args:
        before: the split that was wanted before.
    """
    by_split = {one.split: one.score for one in decision.alternatives}
    if before is None or before not in by_split or decision.split not in by_split:
        return None
    return by_split[decision.split] - by_split[before]


def gains(decisions: Sequence[PlanDecision]) -> dict[int, float | None]:
    """By the decision's number, of those that changed something."""
    found: dict[int, float | None] = {}
    before: str | None = None
    for decision in decisions:
        if decision.changes_something:
            found[decision.number] = gain(decision, before)
        before = decision.split or before
    return found


def alternatives_text(alternatives: Sequence[Alternative]) -> str:
    """Such as ``4P+4D 97.1% (12.3), 5P+3D 95.0% (11.9)``: attainment, and score in parentheses."""
    return ", ".join(
        f"{one.split} {100 * one.attainment:.1f}% ({one.score:.2f})"
        for one in alternatives[:MAX_ALTERNATIVES]
    )
