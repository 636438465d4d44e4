"""One simulation of the planner benchmark: a static split, a schedule of splits, or the planner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.planner_schedule import Mover, Rule, Schedule, switches
from benchmarks.routing_runs import PROFILE, SLO
from core.types import Role
from planner.settings import PlannedShape, PlannerSettings
from router.admission_limits import AdmissionLimits
from router.policies import make_policy
from router.routing import RoutingPolicy
from simulator.actions import Action
from simulator.profiles.files import find_profile
from simulator.reports.summary import slo_met, summarize
from simulator.result import SimulationResult, Slo
from simulator.scenario import static_cluster
from simulator.simulation import Simulation, simulate
from simulator.spec import ClusterSpec
from simulator.traces.trace import Trace

WINDOW_S = 15.0
"""Of the oracle's first guess."""
SEED = 1
SHAPE = "worker"
FEW_GPUS = 8
"""With more..."""
REST_PER_GPU_S = 150e-6
"""...the router rests so long between two looks at its waiting line, as a live one does: four times as long
as the look took. Without it, every word of a worker has up to sixteen requests placed anew."""
HOUR_S = 3600.0
_PERCENTILES = ("p50", "p90", "p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What all runs of a case have in common."""

    trace: Trace
    num_gpus: int
    slo: Slo = SLO
    admission: bool = True
    """Whether requests that would be late are refused; if not, all are let in at once."""

    def cluster(self, num_prefill: int, num_gpus: int | None = None) -> ClusterSpec:
        """A split of all GPUs, or of ``num_gpus``."""
        profile = find_profile(PROFILE)
        return static_cluster(
            self.trace,
            prefill=profile,
            num_prefill=num_prefill,
            decode=profile,
            num_decode=(num_gpus or self.num_gpus) - num_prefill,
            ttft_slo_s=self.slo.ttft_s,
            tpot_slo_s=self.slo.tpot_s,
            admission=AdmissionLimits() if self.admission else None,
            admission_rest_s=REST_PER_GPU_S * self.num_gpus if self.num_gpus > FEW_GPUS else 0.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """From then on so many workers have each role."""

    time_s: float
    num_prefill: int
    num_decode: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """What came of a simulation."""

    name: str
    num_met: int
    """Requests within both targets: what runs are compared by."""
    num_requests: int
    goodput_rps: float
    """Of those, by the time in which requests arrived."""
    goodput_per_gpu_hour: float
    mean_gpus: float
    ttft_ms: tuple[float, ...]
    """p50, p90, p99."""
    tpot_ms: tuple[float, ...]
    worst_minute: float
    """The least attainment of a minute; nan where no minute counts."""
    switches_per_hour: float
    num_switches: int
    met_by_window: npt.NDArray[np.int64]
    steps: tuple[Step, ...]
    """The split over time, as the workers had it."""
    cpu_s: float
    """Of the whole simulation."""
    num_decisions: int = 0
    decision_mean_s: float = 0.0
    """CPU time."""
    decision_max_s: float = 0.0

    @property
    def attainment(self) -> float:
        return self.num_met / self.num_requests


def run_static(scene: Scene, num_prefill: int, num_gpus: int | None = None) -> Run:
    """One split from start to end."""
    started_s = time.process_time()
    spec = scene.cluster(num_prefill, num_gpus)
    size = num_gpus or scene.num_gpus
    return _run(f"{num_prefill}P+{size - num_prefill}D", scene, spec, simulate_with(scene, spec), started_s)


def run_schedule(scene: Scene, schedule: Schedule, rule: Rule, name: str = "oracle") -> Run:
    """A schedule of splits; the first one is there from the start."""
    started_s = time.process_time()
    spec = scene.cluster(schedule[0].num_prefill)
    if rule is Rule.FIXED:
        result = simulate_with(scene, spec, switches(schedule, SHAPE, scene.num_gpus))
    else:
        simulation = Simulation(scene.trace, spec, policy, (), SEED, None)
        Mover(simulation).follow(schedule)
        result = simulation.run()
    return _run(name, scene, spec, result, started_s)


def run_planner(scene: Scene, num_prefill: int, settings: PlannerSettings | None = None) -> Run:
    """The planner, which finds this split when it starts."""
    settings = settings or planner_settings(scene.slo, least=scene.num_gpus, most=scene.num_gpus)
    started_s = time.process_time()
    spec = scene.cluster(num_prefill)
    groups = tuple(replace(group, startup_s=settings.shapes[0].startup_s) for group in spec.groups)
    spec = replace(spec, groups=groups, planner=settings)
    return _run("planner", scene, spec, simulate_with(scene, spec), started_s)


def planner_settings(slo: Slo, *, least: int, most: int, startup_s: float | None = None) -> PlannerSettings:
    """Of one shape, its counts between two bounds."""
    profile = find_profile(PROFILE)
    shape = PlannedShape(
        name=SHAPE,
        allowed_roles=frozenset(Role),
        gpus_per_worker=profile.gpus_per_worker,
        min_workers=least,
        max_workers=most,
        startup_s=profile.startup_s if startup_s is None else startup_s,
    )
    return PlannerSettings(shapes=(shape,), ttft_slo_s=slo.ttft_s, tpot_slo_s=slo.tpot_s)


def policy(seed: int) -> RoutingPolicy:
    """The same on every side."""
    return make_policy("predictive", seed)


def simulate_with(scene: Scene, spec: ClusterSpec, actions: Sequence[Action] = ()) -> SimulationResult:
    return simulate(scene.trace, spec, make_policy=policy, actions=actions, seed=SEED)


def _run(name: str, scene: Scene, spec: ClusterSpec, result: SimulationResult, started_s: float) -> Run:
    summary = summarize(result, scene.slo, settings={})
    ttft_met, tpot_met = slo_met(result.requests, scene.slo)
    met = ttft_met & tpot_met
    duration_s = scene.trace.duration_s
    window = (result.requests.arrival_s // WINDOW_S).astype(np.int64)
    worst = summary["worst_minute"]
    return Run(
        name=name,
        num_met=int(met.sum()),
        num_requests=len(met),
        goodput_rps=float(met.sum()) / duration_s,
        goodput_per_gpu_hour=float(met.sum()) * HOUR_S / result.gpu_seconds,
        mean_gpus=result.gpu_seconds / result.simulated_s,
        ttft_ms=_percentiles(summary["ttft_ms"]),
        tpot_ms=_percentiles(summary["tpot_ms"]),
        worst_minute=worst["attainment"] if worst else float("nan"),
        switches_per_hour=result.num_role_switches * HOUR_S / result.simulated_s,
        num_switches=result.num_role_switches,
        met_by_window=np.bincount(window[met], minlength=int(window[-1]) + 1),
        steps=_steps(spec, result),
        cpu_s=time.process_time() - started_s,
        num_decisions=len(result.decisions),
        decision_mean_s=result.planner_cpu_s / max(1, len(result.decisions)),
        decision_max_s=result.planner_cpu_max_s,
    )


def figures(run: Run) -> dict[str, Any]:
    """A run for JSON."""
    return {
        "split": run.name,
        "attainment": run.attainment,
        "goodput_rps": run.goodput_rps,
        "goodput_per_gpu_hour": run.goodput_per_gpu_hour,
        "mean_gpus": run.mean_gpus,
        "ttft_ms": dict(zip(_PERCENTILES, run.ttft_ms, strict=True)),
        "tpot_ms": dict(zip(_PERCENTILES, run.tpot_ms, strict=True)),
        "worst_minute": run.worst_minute,
        "switches_per_hour": run.switches_per_hour,
    }


def _steps(spec: ClusterSpec, result: SimulationResult) -> tuple[Step, ...]:
    """The split after each event that changed it, from the log of events."""
    counts = dict.fromkeys(Role, 0)
    roles: dict[str, Role] = {}
    for group in spec.groups:
        number = 0
        for role in (Role.PREFILL, Role.DECODE):
            for _ in range(group.num_workers.get(role, 0)):
                roles[f"{group.shape}-{number}"] = role
                counts[role] += 1
                number += 1
    steps = [Step(time_s=0.0, num_prefill=counts[Role.PREFILL], num_decode=counts[Role.DECODE])]
    for event in result.events:
        before = roles.pop(event.worker_id, None)
        if event.kind == "role_switch":
            roles[event.worker_id] = Role(event.detail.rsplit(" ", 1)[-1])
        elif event.kind == "start":
            roles[event.worker_id] = Role(event.detail)
        elif event.kind != "stop" and before is not None:
            roles[event.worker_id] = before
        counts[Role.PREFILL] = sum(role is Role.PREFILL for role in roles.values())
        num_prefill = counts[Role.PREFILL]
        now = Step(time_s=event.time_s, num_prefill=num_prefill, num_decode=len(roles) - num_prefill)
        if steps[-1].time_s == now.time_s:
            steps.pop()
        steps.append(now)
    return tuple(steps)


def _percentiles(distribution: dict[str, Any]) -> tuple[float, ...]:
    values = (distribution[name] for name in _PERCENTILES)
    return tuple(float("nan") if value is None else value for value in values)
