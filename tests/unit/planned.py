"""Clusters as a planner sees them: workers, and routers that count a made-up load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from core.clock import ManualClock
from core.performance_model import H200_LLAMA_8B_FP8, StepTime
from core.step_times import StepTimes
from core.types import Role, WorkerLoad
from planner.capacity import WorkerKind
from planner.decision import PlanDecision
from planner.demand import Demand, PromptKind
from planner.observation import Observation, ObservedRouter, ObservedWorker
from planner.planner import Planner
from planner.settings import PlannedShape, PlannerSettings
from router.traffic_counter import TrafficCounter
from tests.unit.test_registry import report

P, D = Role.PREFILL, Role.DECODE
SIZES = {
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "num_kv_blocks": 40_000,
    "bytes_per_block": 16 * 65_536,
}
"""Of an H200 with an 8B model."""


class Clock(ManualClock):
    """A clock that may jump, too."""

    def jump(self, seconds: float) -> None:
        self._now_s += seconds


def shape(name: str = "s", roles: Iterable[Role] = Role, **changes: Any) -> PlannedShape:
    """Counts stay as they are unless ``min_workers`` and ``max_workers`` say otherwise."""
    settings: dict[str, Any] = {
        "gpus_per_worker": 1.0,
        "min_workers": 4,
        "max_workers": 4,
        "startup_s": 40.0,
    }
    return PlannedShape(name=name, allowed_roles=frozenset(roles), **(settings | changes))


def planner_settings(*shapes: PlannedShape, **changes: Any) -> PlannerSettings:
    targets: dict[str, Any] = {"ttft_slo_s": 0.5, "tpot_slo_s": 0.02}
    return PlannerSettings(shapes=shapes or (shape(),), **(targets | changes))


def worker(
    worker_id: str,
    role: Role,
    *,
    shape: str = "s",
    allowed: Iterable[Role] = Role,
    age_s: float = 0.0,
    load: WorkerLoad | None = None,
    **changes: Any,
) -> ObservedWorker:
    """A worker that does as it is told."""
    fields = SIZES | {"allowed_roles": frozenset(allowed), "load": load or WorkerLoad()} | changes
    told = report(worker_id, shape=shape, role=role, role_assigned=True, **fields)
    return ObservedWorker(report=told, desired_role=role, age_s=age_s)


def workers(num_prefill: int, num_decode: int, *, shape: str = "s", **more: Any) -> list[ObservedWorker]:
    """Named by their shape and number, those that prefill first."""
    roles = [P] * num_prefill + [D] * num_decode
    return [worker(f"{shape}-{number:03}", role, shape=shape, **more) for number, role in enumerate(roles)]


def with_roles(present: Sequence[ObservedWorker], decision: PlanDecision) -> list[ObservedWorker]:
    """The workers after a decision's role changes."""
    roles = {change.worker_id: change.role for change in decision.role_changes}
    changed = []
    for each in present:
        role = roles.get(each.report.worker_id, each.desired_role)
        changed.append(replace(each, report=replace(each.report, role=role), desired_role=role))
    return changed


def kind(step_time: StepTime = H200_LLAMA_8B_FP8, **changes: Any) -> WorkerKind:
    settings: dict[str, Any] = {
        "prefill_step_time": step_time,
        "decode_step_time": step_time,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "kv_capacity_tokens": 640_000,
        "kv_bytes_per_token": 65_536.0,
    }
    return WorkerKind(**(settings | changes))


def demand(
    rate_rps: float, prompt_tokens: float = 3000, output_tokens: float = 300, **changes: Any
) -> Demand:
    prompts = (PromptKind(new_tokens=prompt_tokens, cached_tokens=0.0, share=1.0),)
    return Demand(rate_rps=rate_rps, prompts=prompts, output_tokens=output_tokens, **changes)


class _Answer:
    def __init__(self, counter: TrafficCounter, prompt_tokens: int, whole: int) -> None:
        self._counter = counter
        self._prompt_tokens = prompt_tokens
        self._whole = whole
        self._grown = 0.0

    def grow(self, more: float) -> list[_Answer]:
        """Itself, if it goes on."""
        before, self._grown = int(self._grown), min(self._grown + more, self._whole)
        if int(self._grown) > before:
            self._counter.tokens(self._prompt_tokens, before, int(self._grown) - before)
        if self._grown < self._whole:
            return [self]
        self._counter.finished(self._whole, ttft_met=True, tpot_met=True)
        return []


class Load:
    """Requests that come at random to routers, and answers that grow at one pace.

    Args:
        tpot_s: between two tokens of an answer.
    """

    def __init__(self, *, num_routers: int = 1, seed: int = 0, tpot_s: float = 0.02) -> None:
        self.counters = [TrafficCounter(f"r{number}") for number in range(num_routers)]
        self._rng = np.random.default_rng(seed)
        self._tpot_s = tpot_s
        self._ongoing: list[_Answer] = []

    def go_on(
        self,
        seconds: float,
        rate_rps: float,
        *,
        prompt: int = 3000,
        output: int = 300,
        cached: float = 0.0,
        bunch: int = 1,
    ) -> None:
        """Time passes.

        Args:
            cached: share of the prompts that workers have.
            bunch: requests that come together.
        """
        ongoing = []
        more = seconds / self._tpot_s
        for answer in self._ongoing:
            ongoing += answer.grow(more)
        for _ in range(self._rng.poisson(rate_rps * seconds / bunch) * bunch):
            counter = self.counters[self._rng.integers(len(self.counters))]
            counter.arrived(prompt)
            counter.placed(prompt, round(cached * prompt))
            ongoing += _Answer(counter, prompt, output).grow(more * self._rng.random())
        self._ongoing = ongoing

    @property
    def routers(self) -> list[ObservedRouter]:
        """What all say now."""
        return [
            ObservedRouter(
                traffic=counter.summary(num_waiting=0, waiting_prompt_tokens=0, num_ongoing=0), age_s=0.3
            )
            for counter in self.counters
        ]


class Bench:
    """A planner, what it looks at, and the time."""

    def __init__(self, settings: PlannerSettings | None = None, **load: Any) -> None:
        self.settings = settings or planner_settings()
        self.clock = Clock(1000.0)
        self.load = Load(**load)
        self.wanted: dict[str, int] = {}
        self.workers: list[ObservedWorker] = workers(2, 2)
        self.planner = self.new_planner()

    def new_planner(self) -> Planner:
        """One that knows nothing yet."""
        step_times = StepTimes({each.name: H200_LLAMA_8B_FP8 for each in self.settings.shapes}.get)
        return Planner(self.settings, step_times, self.clock)

    def look(self, rate_rps: float = 0.0, *, seconds: float = 1.0, **how: Any) -> PlanDecision:
        """Time passes, then the planner looks; nothing is carried out."""
        self.clock.advance(seconds)
        self.load.go_on(seconds, rate_rps, **how)
        return self.planner.step(self.observation())

    def observation(self, **changes: Any) -> Observation:
        seen: dict[str, Any] = {
            "workers": tuple(self.workers),
            "routers": tuple(self.load.routers),
            "wanted": self.wanted,
        }
        return Observation(**(seen | changes))

    def look_on(self, num_looks: int, rate_rps: float, **how: Any) -> list[PlanDecision]:
        """Many looks whose role changes are carried out."""
        decisions = []
        for _ in range(num_looks):
            decisions.append(self.look(rate_rps, **how))
            self.workers = with_roles(self.workers, decisions[-1])
        return decisions
