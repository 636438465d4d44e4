"""Which role the registry of a simulated cluster wants each worker to have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from core.types import Role
from simulator.spec import WorkerGroup
from simulator.worker import SimulatedWorker


class DesiredRoles:
    """As in ``planner/registry.py``: a new worker gets the role that its shape's split lacks most."""

    def __init__(self, groups: Sequence[WorkerGroup]) -> None:
        self.by_worker: dict[str, Role] = {}
        """Of those that have been given another role than they started with."""
        self._split = {group.shape: Counter(group.num_workers) for group in groups}
        """The one at the start, as changed by the moves since."""

    def of(self, worker: SimulatedWorker) -> Role:
        """The role it should have."""
        return self.by_worker.get(worker.worker_id, worker.role)

    def assign(self, worker: SimulatedWorker, role: Role) -> None:
        """Gives it a role that its shape may take."""
        before = self.of(worker)
        if role is not before:
            split = self._split[worker.group.shape]
            split[before] = max(0, split[before] - 1)
            split[role] += 1
            self.by_worker[worker.worker_id] = role

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        self.by_worker.pop(worker_id, None)

    def lacking(self, group: WorkerGroup, workers: Iterable[SimulatedWorker]) -> Role:
        """The role for one more worker besides these of the same shape."""
        taken = Counter(self.of(worker) for worker in workers)
        split = self._split[group.shape]
        return max(sorted(group.allowed_roles), key=lambda role: split[role] - taken[role])
