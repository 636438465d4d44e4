"""What the planner's loop needs of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from core.types import Role
from planner.decision import PlanDecision
from planner.observation import Observation


class ClusterPort(Protocol):
    """The registry."""

    async def observe(self) -> Observation:
        """The cluster now."""

    async def assign_role(self, worker_id: str, role: Role) -> None:
        """Makes a worker take a role.

        Raises:
            Exception: no such worker, a role it may not take, or nobody answers.
        """


class Scaler(Protocol):
    """Who starts and stops workers."""

    async def wanted(self) -> Mapping[str, int]:
        """Workers by shape that have been asked for."""

    async def ask(self, shape: str, num_workers: int) -> None:
        """Asks for so many workers of a shape. They come when there is room for them."""


class DecidesSplits(Protocol):
    """The planner, or what a test puts in its place."""

    def step(self, observation: Observation) -> PlanDecision:
        """Looks at the cluster once."""
