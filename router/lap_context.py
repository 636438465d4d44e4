"""What all laps of a router share."""

from __future__ import annotations

from dataclasses import dataclass

from core.clock import Clock
from router.background import Background
from router.cluster_view import ClusterView


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """How long is waited, and how often something is begun anew."""

    prefill_timeout_s: float
    """A leg that has not given its first token after so long is given to another worker."""
    stall_timeout_s: float
    """A decode leg that falls silent for so long after its first token is given to another worker."""
    resume_timeout_s: float = 30.0
    """A request that was begun waits so long for a worker that can go on with it."""
    max_retries: int = 3
    """Times a request is begun anew after a worker was lost."""
    replays: bool = True
    """Whether engines can begin an answer with given tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LapContext:
    """Workers, limits, time, and who cleans up."""

    view: ClusterView
    config: RelayConfig
    clock: Clock
    background: Background
