"""What may happen to a simulated cluster besides requests: role switches, changes of counts, faults."""

from __future__ import annotations

from dataclasses import dataclass

from core.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchRole:
    """The registry gives the worker another role, and tells it."""

    time_s: float
    worker_id: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class AddWorker:
    """GPUs are taken now; the worker serves once it has started."""

    time_s: float
    shape: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveWorker:
    """The worker takes nothing new, finishes what it has, and gives its GPUs back."""

    time_s: float
    worker_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """The worker dies with all it holds."""

    time_s: float
    worker_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """The worker computes nothing for a while."""

    time_s: float
    worker_id: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FailPulls:
    """The worker's KV pulls fail for a while."""

    time_s: float
    worker_id: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowLink:
    """The worker's KV transfers take ``factor`` times as long for a while."""

    time_s: float
    worker_id: str
    duration_s: float
    factor: float


Action = SwitchRole | AddWorker | RemoveWorker | Kill | Stall | FailPulls | SlowLink
