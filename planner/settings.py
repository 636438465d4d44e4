"""What the planner is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from core.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShape:
    """One shape whose workers the planner gives roles to."""

    name: str
    allowed_roles: frozenset[Role]
    gpus_per_worker: float
    """A CPU worker counts as 1."""
    min_workers: int
    max_workers: int
    """Equal to ``min_workers`` where counts stay as they are."""
    startup_s: float
    """From asking for a worker to its first request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSettings:
    """Of one model."""

    shapes: tuple[PlannedShape, ...]
    ttft_slo_s: float
    tpot_slo_s: float
    interval_s: float = 1.0
    """Between two looks at the cluster."""
    stale_after_s: float = 5.0
    """What is older than this is not gone by."""
    gpu_budget: float | None = None
    """Most GPUs all shapes together may hold; None: what ``max_workers`` come to."""
    attainment_target: float = 0.99
    """Share of the requests within both targets, of those that could be, that is worth a GPU more."""
    num_spares: int = 0
    """Workers kept beyond what the load asks for."""
    hold_s: float | None = None
    """How long fewer GPUs must have been enough before one is given back; None: as long as a worker takes to
    start, which never holds twice the GPU time that foresight would."""

    @property
    def counts_are_free(self) -> bool:
        """Whether any shape may have more workers or fewer."""
        return any(shape.min_workers < shape.max_workers for shape in self.shapes)
