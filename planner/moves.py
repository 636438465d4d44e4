"""From one split to another: which workers change roles, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.types import Role
from planner.decision import RoleChange
from planner.observation import ObservedWorker
from planner.split import PlannedSplit

RUNNING_COST = 0.05
"""Requests missed for each answer that runs on a worker which begins to prefill: its steps get slow."""
WAITING_COST = 0.5
"""...and for each prompt that waits on a worker which begins to decode."""
SWITCH_COST = 0.5
"""...and for each worker that switches, whatever it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Role changes and their price."""

    changes: tuple[RoleChange, ...]
    cost_requests: float
    """Requests that miss a target because of them."""


def cheapest_moves(workers: Sequence[ObservedWorker], target: PlannedSplit) -> Moves:
    """The role changes that make ``target`` of the workers' desired roles; the least busy switch."""
    changes: list[RoleChange] = []
    cost = 0.0
    for wanted in target.shapes:
        mine = [worker for worker in workers if worker.report.shape == wanted.shape]
        for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            num_more = wanted.num_of(role) - sum(worker.desired_role is role for worker in mine)
            if num_more <= 0:
                continue
            able = [worker for worker in mine if worker.desired_role is other]
            able.sort(key=lambda worker: (price(worker), worker.report.worker_id))
            for worker in able[:num_more]:
                changes.append(RoleChange(worker_id=worker.report.worker_id, shape=wanted.shape, role=role))
                cost += SWITCH_COST + price(worker)
    return Moves(changes=tuple(changes), cost_requests=cost)


def price(worker: ObservedWorker) -> float:
    """Requests missed if the worker switches, by what it does now."""
    load = worker.report.load
    if worker.desired_role is Role.DECODE:
        return RUNNING_COST * load.num_running
    return WAITING_COST * load.num_waiting
