"""What the planner sees of the cluster at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.traffic import TrafficSummary
from core.types import Role, WorkerReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedWorker:
    """A worker that the registry counts as present."""

    report: WorkerReport
    desired_role: Role
    """What the registry tells it to be; its report may not say so yet."""
    age_s: float = 0.0
    """Since it was last heard of, in time in which it could have been."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedRouter:
    """A router's last word."""

    traffic: TrafficSummary
    age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The cluster, as the registry knows it."""

    workers: tuple[ObservedWorker, ...]
    routers: tuple[ObservedRouter, ...]
    wanted: Mapping[str, int] = field(default_factory=dict)
    """Workers that each shape has been asked to have; more than are present while some start. A shape that is
    not named has as many as are present."""
    rebuilding: bool = False
    """The registry has just started and may not know every worker yet."""
