"""From the planner's options of `baton simulate` to its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.errors import ConfigError
from planner.settings import PlannedShape, PlannerSettings
from simulator.result import Slo
from simulator.spec import ClusterSpec, WorkerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerOptions:
    """None and empty mean the configuration's, or the built-in default."""

    enabled: bool | None = None
    gpu_budget: float | None = None
    min_workers: Sequence[str] = ()
    """``N`` for all shapes or ``shape=N``."""
    max_workers: Sequence[str] = ()

    def refuse_counts(self) -> None:
        """
        Raises:
            ConfigError: options are given that without a planner change nothing.
        """
        if self.gpu_budget is not None or self.min_workers or self.max_workers:
            raise ConfigError("--gpu-budget, --min-workers and --max-workers go with --planner: add it")


def simulated_planner(
    cluster: ClusterSpec, slo: Slo, options: PlannerOptions, configured: PlannerSettings | None = None
) -> PlannerSettings:
    """What the planner of a simulated cluster is told.

    Counts stay as they are unless the configuration or an option says otherwise. A budget among the options
    lets shapes grow up to it that could not grow at all.

    Args:
        configured: by the configuration file, if there is one.

    Raises:
        ConfigError: counts, budget and the workers at the start do not go together.
    """
    names = [group.shape for group in cluster.groups]
    least = _by_shape(options.min_workers, names, "--min-workers")
    most = _by_shape(options.max_workers, names, "--max-workers")
    known = {shape.name: shape for shape in configured.shapes} if configured is not None else {}
    budget = options.gpu_budget
    shapes = []
    for group in cluster.groups:
        shape = known.get(group.shape) or _as_it_starts(group)
        shape = replace(shape, gpus_per_worker=_gpus(group), startup_s=group.startup_s)
        num_workers = sum(group.num_workers.values())
        if budget is not None and shape.max_workers == num_workers:
            shape = replace(shape, max_workers=max(num_workers, math.floor(budget / _gpus(group))))
        shape = replace(
            shape,
            min_workers=least.get(group.shape, shape.min_workers),
            max_workers=most.get(group.shape, shape.max_workers),
        )
        _check(shape, num_workers)
        shapes.append(shape)
    settings = configured or PlannerSettings(shapes=(), ttft_slo_s=slo.ttft_s, tpot_slo_s=slo.tpot_s)
    if budget is None:
        budget = settings.gpu_budget
    held = sum(_gpus(group) * sum(group.num_workers.values()) for group in cluster.groups)
    if budget is not None and budget < held:
        raise ConfigError(f"the cluster starts with {held:g} GPUs, more than the budget of {budget:g}")
    return replace(
        settings, shapes=tuple(shapes), ttft_slo_s=slo.ttft_s, tpot_slo_s=slo.tpot_s, gpu_budget=budget
    )


def planner_record(settings: PlannerSettings) -> dict[str, Any]:
    """What was chosen, for the record."""
    return {
        "gpu_budget": settings.gpu_budget,
        "workers": {shape.name: [shape.min_workers, shape.max_workers] for shape in settings.shapes},
        "interval_s": settings.interval_s,
        "attainment_target": settings.attainment_target,
        "spares": settings.num_spares,
        "hold_s": settings.hold_s,
    }


def _as_it_starts(group: WorkerGroup) -> PlannedShape:
    num_workers = sum(group.num_workers.values())
    return PlannedShape(
        name=group.shape,
        allowed_roles=group.allowed_roles,
        gpus_per_worker=_gpus(group),
        min_workers=num_workers,
        max_workers=num_workers,
        startup_s=group.startup_s,
    )


def _gpus(group: WorkerGroup) -> float:
    return group.gpus_per_worker or 1.0


def _check(shape: PlannedShape, num_workers: int) -> None:
    if not shape.min_workers <= num_workers <= shape.max_workers:
        raise ConfigError(
            f"shape {shape.name!r} starts with {num_workers} workers, but may have "
            f"{shape.min_workers} to {shape.max_workers}: change --min-workers, --max-workers or --gpu-budget"
        )


def _by_shape(given: Sequence[str], shapes: Sequence[str], option: str) -> dict[str, int]:
    """Counts by shape from ``N`` and ``shape=N``, the latter going first."""
    for_all: int | None = None
    own: dict[str, int] = {}
    for text in given:
        shape, equals, number = text.rpartition("=")
        if not number.isdecimal():
            raise ConfigError(f"{option} takes N or SHAPE=N, not {text!r}")
        if not equals:
            for_all = int(number)
        elif shape in shapes:
            own[shape] = int(number)
        else:
            raise ConfigError(f"{option}: there is no shape {shape!r}; there is {', '.join(shapes)}")
    return ({} if for_all is None else dict.fromkeys(shapes, for_all)) | own
