"""Shows the planner's looks as metrics."""

from __future__ import annotations

from collections import Counter
from typing import Any

from core.clock import Clock
from core.corrected_step_time import CorrectedStepTime
from core.step_times import StepTimes
from core.types import Role
from planner.decision import PlanDecision
from planner.observation import Observation
from planner.settings import PlannerSettings
from planner.split import split_of
from telemetry.planner_metrics import PlannerMetrics


class Instruments:
    """One model's."""

    def __init__(
        self, metrics: PlannerMetrics, settings: PlannerSettings, step_times: StepTimes, clock: Clock
    ) -> None:
        self._metrics = metrics
        self._shapes = settings.shapes
        self._step_times = step_times
        self._clock = clock
        self._started_at_s = self._observed_at_s = clock.now_s()
        metrics.observation_age.set_function(lambda: self.observation_age_s)

    @property
    def observation_age_s(self) -> float:
        """Since the cluster was last seen, or since the start."""
        return self._clock.now_s() - self._observed_at_s

    def observed(self, observation: Observation) -> None:
        """The registry has answered."""
        self._observed_at_s = self._clock.now_s()
        present = Counter(worker.report.role for worker in observation.workers)
        for role in Role:
            self._metrics.present.labels(role).set(present[role])

    def decided(self, observation: Observation, decision: PlanDecision, cpu_s: float) -> None:
        """A look has come to a decision."""
        metrics = self._metrics
        metrics.decisions.labels(decision.verdict).inc()
        metrics.cpu.observe(cpu_s)
        roles = {worker.report.worker_id: worker.desired_role for worker in observation.workers}
        roles |= {change.worker_id: change.role for change in decision.role_changes}
        wanted = Counter(roles.values())
        for role in Role:
            metrics.wanted.labels(role).set(wanted[role])
        metrics.set_inputs(decision.inputs)
        attainment = {each.split: each.attainment for each in decision.alternatives}
        metrics.set_attainment(
            current=attainment.get(self._label_of(observation)), chosen=attainment.get(decision.split)
        )
        for factor in self.factors():
            metrics.step_factor.labels(factor["shape"], factor["role"], factor["phase"]).set(factor["factor"])

    def failed(self, doing: str) -> None:
        """Something could not be done."""
        self._metrics.failures.labels(doing).inc()

    def role_changed(self, before: str, now: str) -> None:
        """A worker was told another role."""
        self._metrics.role_changes.labels(before, now).inc()

    def factors(self) -> list[dict[str, Any]]:
        """How much slower steps are than the shapes' profiles say, as learned so far."""
        found = []
        for shape in self._shapes:
            for role in sorted(shape.allowed_roles):
                step_time = self._step_times.of(shape.name, role)
                if isinstance(step_time, CorrectedStepTime):
                    for phase, factor in (
                        ("prefill", step_time.prefill_factor),
                        ("decode", step_time.decode_factor),
                    ):
                        found.append(
                            {"shape": shape.name, "role": role.value, "phase": phase, "factor": factor}
                        )
        return found

    def _label_of(self, observation: Observation) -> str:
        roles = ((worker.report.shape, worker.desired_role) for worker in observation.workers)
        return split_of(roles, [shape.name for shape in self._shapes]).label
