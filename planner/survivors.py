"""Role changes that keep both phases served when workers go, or have gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.types import Role
from planner.decision import RoleChange
from planner.moves import price
from planner.observation import ObservedWorker


def with_decode(workers: Sequence[ObservedWorker]) -> tuple[RoleChange, ...]:
    """The change that makes somebody decode; none if nobody may."""
    return _fill(workers, {}, Role.DECODE)


def with_both_roles(
    workers: Sequence[ObservedWorker],
    seen: Mapping[str, int],
    changes: Sequence[RoleChange],
    counts: Mapping[str, int],
) -> tuple[RoleChange, ...]:
    """``changes``, and what it takes for those who stay to fill the roles that are filled now.

    Who goes is not the planner's to say; most likely it is the youngest.

    Args:
        seen: when each worker was first seen: greater is younger.
        counts: workers that are to stay, by shape.
    """
    roles = {change.worker_id: change.role for change in changes}
    staying: list[ObservedWorker] = []
    for shape, num in counts.items():
        mine = [worker for worker in workers if worker.report.shape == shape]
        staying += sorted(mine, key=lambda worker: seen[worker.report.worker_id])[:num]
    filled = {_role(worker, roles) for worker in workers}
    more: list[RoleChange] = []
    for role in (Role.DECODE, Role.PREFILL):
        if role in filled and not any(_role(worker, roles) is role for worker in staying):
            others = [worker for worker in staying if role in worker.report.allowed_roles]
            if role is Role.DECODE or len(staying) > 1:
                more += _fill(others, roles, role)
                roles |= {change.worker_id: change.role for change in more}
    again = {change.worker_id for change in more}
    return (*(change for change in changes if change.worker_id not in again), *more)


def _fill(workers: Sequence[ObservedWorker], roles: Mapping[str, Role], role: Role) -> tuple[RoleChange, ...]:
    able = [
        worker
        for worker in workers
        if role in worker.report.allowed_roles and _role(worker, roles) is not role
    ]
    if not able:
        return ()
    best = min(able, key=lambda worker: (price(worker), worker.report.worker_id)).report
    return (RoleChange(worker_id=best.worker_id, shape=best.shape, role=role),)


def _role(worker: ObservedWorker, roles: Mapping[str, Role]) -> Role:
    return roles.get(worker.report.worker_id, worker.desired_role)
