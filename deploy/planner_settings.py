"""What the planner's replica is started with: plain data cut from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.performance_profile import PerformanceProfile
from planner.mode import Mode
from planner.settings import PlannedShape, PlannerSettings
from simulator.profiles.files import find_profile

if TYPE_CHECKING:
    from deploy.config_schema import BatonConfig, ModelConfig, ShapeConfig

_STARTUP_S = 60.0
"""Of a worker that no profile tells of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerReplicaSettings:
    """The planner's replica."""

    model: str
    mode: Mode
    planner: PlannerSettings
    profiles: Mapping[str, PerformanceProfile]
    """By shape; shapes without one are left out."""
    bind_host: str | None


def planner_replica_settings(
    config: BatonConfig, model: ModelConfig, bind_host: str | None
) -> PlannerReplicaSettings:
    """Cuts the planner's settings out of the configuration.

    Raises:
        core.errors.ConfigError: a shape's profile is not to be found, or wrong.
    """
    profiles = {
        shape.name: find_profile(shape.profile) for shape in model.shapes if shape.profile is not None
    }
    return PlannerReplicaSettings(
        model=model.name,
        mode=Mode(config.planner.mode),
        planner=planner_settings(config, model, profiles),
        profiles=profiles,
        bind_host=bind_host,
    )


def planner_settings(
    config: BatonConfig, model: ModelConfig, profiles: Mapping[str, PerformanceProfile]
) -> PlannerSettings:
    """What the planner is told of a model.

    Args:
        profiles: by shape; they tell how long a worker takes to start.
    """
    planner = config.planner
    return PlannerSettings(
        shapes=tuple(planned_shape(shape, profiles.get(shape.name)) for shape in model.shapes),
        ttft_slo_s=model.slo.ttft_ms / 1000,
        tpot_slo_s=model.slo.tpot_ms / 1000,
        interval_s=planner.interval_s,
        stale_after_s=planner.stale_after_s,
        gpu_budget=planner.gpu_budget,
        attainment_target=planner.attainment_target,
        num_spares=planner.spares,
        hold_s=planner.hold_s,
    )


def planned_shape(shape: ShapeConfig, profile: PerformanceProfile | None = None) -> PlannedShape:
    """A shape as the planner knows it."""
    return PlannedShape(
        name=shape.name,
        allowed_roles=frozenset(shape.roles),
        gpus_per_worker=shape.gpus_per_worker or 1.0,
        min_workers=shape.counts.start,
        max_workers=shape.counts.stop - 1,
        startup_s=_STARTUP_S if profile is None else profile.startup_s,
    )
