"""Observe, forecast, decide: from what is seen of the cluster to what should change.

Every look goes the same way: what is known is brought up to date; roles are chosen among the splits of the
workers that are there; where counts are free, the fewest workers are found that the load to come needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from core.clock import Clock
from core.step_times import StepTimes
from core.types import Role
from planner.candidates import role_splits
from planner.counts import CountChooser
from planner.decision import PlanDecision, Verdict
from planner.estimate import Estimate, estimate
from planner.forecast import short_term
from planner.observation import Observation, ObservedRouter, ObservedWorker
from planner.plausible import is_plausible, plausible_worker
from planner.prediction import ClusterState, Predict, QueueingPredictor, Targets
from planner.roles import Choice, RoleChooser
from planner.settings import PlannerSettings
from planner.split import PlannedSplit, split_of
from planner.survivors import with_decode
from planner.traffic_history import TrafficHistory
from planner.worker_kinds import WorkerKinds


class Planner:
    """Decides for one model; does nothing itself.

    Args:
        settings: the model's shapes and targets.
        step_times: of its shapes; learns from the workers' reports.
        predict: how a split would do; None: by queueing formulas.
    """

    def __init__(
        self,
        settings: PlannerSettings,
        step_times: StepTimes,
        clock: Clock,
        predict: Predict | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._kinds = WorkerKinds(step_times)
        self._traffic = TrafficHistory()
        self._predict = predict or QueueingPredictor(
            Targets(ttft_s=settings.ttft_slo_s, tpot_s=settings.tpot_slo_s)
        )
        self._roles = RoleChooser()
        self._counts = CountChooser(settings, self._predict) if settings.counts_are_free else None
        self._shape_names = [shape.name for shape in settings.shapes]
        self._num_looks = 0
        self._seen: dict[str, int] = {}
        """Workers that are present, with the look that first saw them."""

    def step(self, observation: Observation) -> PlanDecision:
        """Looks at the cluster once."""
        self._num_looks += 1
        now_s = self._clock.now_s()
        stale_after_s = self._settings.stale_after_s
        routers = [
            router
            for router in observation.routers
            if 0.0 <= router.age_s <= stale_after_s and is_plausible(router)
        ]
        workers = [
            plausible_worker(worker)
            for worker in observation.workers
            if 0.0 <= worker.age_s <= stale_after_s
            and not worker.report.draining
            and worker.report.shape in self._shape_names
        ]
        self._seen = {
            worker.report.worker_id: self._seen.get(worker.report.worker_id, self._num_looks)
            for worker in workers
        }
        self._kinds.observe(worker.report for worker in workers)
        self._traffic.observe(now_s, routers)
        if self._counts is not None:
            self._counts.observe(now_s, self._traffic)
        present = split_of(((w.report.shape, w.desired_role) for w in workers), self._shape_names)
        hold = PlanDecision(
            number=self._num_looks, at_s=now_s, verdict=Verdict.BLIND, reason="", split=present.label
        )
        if observation.rebuilding:
            return self._blind(hold, "the registry has just started")
        if not workers:
            return self._blind(hold, "no worker is heard of")
        if not present.num_decode and (changes := with_decode(workers)):
            self._roles.forget()
            roles = {change.worker_id: change.role for change in changes}
            split = split_of(
                ((w.report.shape, roles.get(w.report.worker_id, w.desired_role)) for w in workers),
                self._shape_names,
            )
            return replace(
                hold,
                verdict=Verdict.MOVE,
                reason="nobody decodes",
                split=split.label,
                role_changes=changes,
            )
        if not routers:
            return self._blind(hold, "no router is heard of")
        kinds = self._kinds.kinds(shape.shape for shape in present.shapes if shape.num_workers)
        if not kinds:
            return self._blind(hold, "step times are not known yet")
        load = estimate(tuple(self._traffic.samples))
        if load is None or load.demand.rate_rps <= 0.0:
            decision = self._blind(hold, "too few requests have come")
        else:
            present = PlannedSplit(tuple(s for s in present.shapes if s.num_workers))
            forecast = short_term(load)
            splits = role_splits(self._settings.shapes, present)
            state = _state(routers, workers)
            soon = self._predict(kinds, splits, forecast, state)
            later = self._predict(kinds, splits, forecast, replace(state, num_decoding=None))
            choice = self._roles.choose(workers, splits, soon, later, load.demand.rate_rps)
            decision = self._decision(hold, choice, load)
        if self._counts is None:
            return decision
        leaving = Counter(w.report.shape for w in observation.workers if w.report.draining)
        return self._counts.decide(decision, workers, self._seen, observation.wanted, kinds, load, leaving)

    def _decision(self, hold: PlanDecision, choice: Choice, load: Estimate) -> PlanDecision:
        gpus = {shape.name: shape.gpus_per_worker for shape in self._settings.shapes}
        return replace(
            hold,
            verdict=Verdict.HOLD if choice.chosen is choice.present else Verdict.MOVE,
            reason=choice.reason,
            split=choice.chosen.split.label,
            role_changes=choice.chosen.moves.changes,
            inputs=_inputs(load, choice),
            alternatives=choice.alternatives(gpus),
        )

    def _blind(self, hold: PlanDecision, reason: str) -> PlanDecision:
        self._roles.forget()
        return replace(hold, reason=reason)


def _state(routers: Sequence[ObservedRouter], workers: Sequence[ObservedWorker]) -> ClusterState:
    in_line = sum(router.traffic.waiting_prompt_tokens for router in routers)
    on_workers = sum(worker.report.load.waiting_prefill_tokens for worker in workers)
    decoding = [worker for worker in workers if worker.desired_role is Role.DECODE]
    return ClusterState(
        waiting_prompt_tokens=float(in_line + on_workers),
        num_decoding=float(sum(worker.report.load.num_decoding for worker in decoding)),
        num_decode_workers=len(decoding),
    )


def _inputs(load: Estimate, choice: Choice) -> dict[str, float]:
    demand, prediction = load.demand, choice.present.prediction
    return {
        "rate_rps": demand.rate_rps,
        "rate_error": load.rate_error,
        "window_s": load.window_s,
        "prompt_tokens": demand.prompt_tokens,
        "new_prompt_tokens": sum(kind.share * kind.new_tokens for kind in demand.prompts),
        "output_tokens": demand.output_tokens,
        "arrival_dispersion": demand.arrival_dispersion,
        "attainment": prediction.attainment,
        "prefill_use": prediction.prefill_use,
        "decode_use": prediction.decode_use,
    }
