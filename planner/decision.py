"""What the planner decided, why, and what else it looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from core.types import Role


class Verdict(StrEnum):
    """What came of a look at the cluster."""

    HOLD = "hold"
    """Nothing better was worth its price."""
    MOVE = "move"
    """Roles or counts change."""
    BLIND = "blind"
    """Too little is known to judge: nothing changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChange:
    """One worker takes another role."""

    worker_id: str
    shape: str
    role: Role
    """The new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A split that was looked at. The one that was there and the one that was chosen are among them."""

    split: str
    """Such as ``h200: 3P+5D``."""
    num_gpus: float
    attainment: float
    """Predicted share of requests within both targets, 0 to 1."""
    score: float
    """Requests per second within both targets that it is worth, its price paid: the greatest wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDecision:
    """One look at the cluster."""

    number: int
    """Counts looks since the planner's start."""
    at_s: float
    """On the planner's clock."""
    verdict: Verdict
    reason: str
    split: str
    """The split that is wanted from now on."""
    role_changes: tuple[RoleChange, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    """Workers wanted by shape, where that changes."""
    inputs: Mapping[str, float] = field(default_factory=dict)
    """What was seen and forecast, by name with unit."""
    alternatives: tuple[Alternative, ...] = ()
    """Best first, only the first few."""

    @property
    def changes_something(self) -> bool:
        """Whether there is something to do."""
        return bool(self.role_changes or self.counts)
