"""Observe, forecast, decide: from what is seen of the cluster to what should change."""

from __future__ import annotations

from core.clock import Clock
from core.step_times import StepTimes
from planner.decision import PlanDecision, Verdict
from planner.observation import Observation
from planner.settings import PlannerSettings


class Planner:
    """Decides for one model; does nothing itself.

    Args:
        settings: the model's shapes and targets.
        step_times: of its shapes; learns from the workers' reports.
    """

    def __init__(self, settings: PlannerSettings, step_times: StepTimes, clock: Clock) -> None:
        self._settings = settings
        self._step_times = step_times
        self._clock = clock
        self._num_looks = 0

    def step(self, observation: Observation) -> PlanDecision:
        """Looks at the cluster once."""
        self._num_looks += 1
        return PlanDecision(
            number=self._num_looks,
            at_s=self._clock.now_s(),
            verdict=Verdict.BLIND,
            reason="nothing is known yet",
            split="",
        )
