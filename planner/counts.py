"""How many workers there should be, as part of a decision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.capacity import WorkerKind
from planner.decision import PlanDecision, Verdict
from planner.estimate import Estimate
from planner.observation import ObservedWorker
from planner.prediction import Predict
from planner.rate_forecast import RateForecaster
from planner.settings import PlannerSettings
from planner.sizing import Sizer
from planner.survivors import with_both_roles
from planner.traffic_history import TrafficHistory

SILENCE_S = 60.0
"""Without a request for so long, there is no load."""


class CountChooser:
    """Forecasts the rate of requests and sizes the shapes for it."""

    def __init__(self, settings: PlannerSettings, predict: Predict) -> None:
        self._settings = settings
        self._sizer = Sizer(settings, predict)
        self._forecaster = RateForecaster()
        self._is_silent = False

    def observe(self, now_s: float, traffic: TrafficHistory) -> None:
        """Learns from what came since the last look, if that is known."""
        samples = traffic.samples
        self._is_silent = (
            bool(samples)
            and samples[-1].end_s - samples[0].end_s >= SILENCE_S
            and not any(sample.num_arrived for sample in samples if sample.end_s > now_s - SILENCE_S)
        )
        if samples and samples[-1].end_s == now_s:
            self._forecaster.observe(now_s, samples[-1].num_arrived, samples[-1].seconds)

    def decide(
        self,
        decision: PlanDecision,
        workers: Sequence[ObservedWorker],
        seen: Mapping[str, int],
        wanted: Mapping[str, int],
        kinds: Mapping[str, WorkerKind],
        load: Estimate | None,
        leaving: Mapping[str, int],
    ) -> PlanDecision:
        """The decision, with other counts where the load asks for them.

        Args:
            seen: when each worker was first seen: greater is younger.
            wanted: workers that shapes have been asked to have.
            load: of now; None where nothing is known of it.
            leaving: workers that drain, by shape.
        """
        if load is None and not self._is_silent:
            return decision
        ahead = self._forecaster.forecast(self._sizer.startup_s)
        names = [shape.name for shape in self._settings.shapes]
        there = dict.fromkeys(names, 0) | Counter(worker.report.shape for worker in workers)
        sizing = self._sizer.size(
            decision.at_s,
            kinds,
            {**there, **wanted},
            there,
            None if load is None else load.demand,
            ahead,
            0.0 if load is None else load.rate_error,
            leaving,
        )
        inputs = dict(decision.inputs)
        if ahead is not None:
            inputs |= {"forecast_rps": ahead.mean_rps, "forecast_high_rps": ahead.high_rps}
        if sizing is None:
            return replace(decision, inputs=inputs)
        return replace(
            decision,
            verdict=Verdict.MOVE,
            reason=f"{decision.reason}; {sizing.reason}" if decision.role_changes else sizing.reason,
            counts=sizing.counts,
            role_changes=with_both_roles(workers, seen, decision.role_changes, {**there, **sizing.counts}),
            inputs=inputs,
        )
