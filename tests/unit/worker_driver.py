"""Turns the clock of one worker model and writes down what comes out."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from core.performance_model import LinearStepTime, StepTime
from core.types import WorkerLoad
from core.worker_events import (
    Finished,
    KvPull,
    Prefilled,
    SequenceSpec,
    Step,
    StepResult,
    WorkerModelConfig,
)
from core.worker_model import WorkerModel

SMALL = WorkerModelConfig(
    num_kv_blocks=16,
    block_size_tokens=4,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    lease_s=5.0,
)
ONE_MS = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.0,
    prefill_base_ms=1.0,
    decode_base_ms=1.0,
    decode_ms_per_seq=0.0,
    decode_ms_per_kv_token=0.0,
)


def spec(request_id: str, num_prompt_tokens: int, max_tokens: int, **more: Any) -> SequenceSpec:
    return SequenceSpec(
        request_id=request_id, num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, **more
    )


class Driver:
    """One worker on virtual time, driven the way a simulator drives it."""

    def __init__(
        self,
        config: WorkerModelConfig = SMALL,
        step_time: StepTime = ONE_MS,
        *,
        max_decode_steps: int = 1,
        pull_s: float = 0.0105,
    ) -> None:
        self.model = WorkerModel(config, step_time)
        self.now_s = 0.0
        self.token_times_s: dict[str, list[float]] = {}
        self.prefilled: dict[str, Prefilled] = {}
        self.finished: dict[str, Finished] = {}
        self.steps: list[Step] = []
        self.pulls: list[KvPull] = []
        self.unneeded_pulls: list[str] = []
        self.preempted: list[str] = []
        self.expired: list[str] = []
        self.pulls_succeed = True
        self._max_decode_steps = max_decode_steps
        self._pull_s = pull_s
        self._arrivals: list[tuple[float, str, bool]] = []

    def submit(self, *specs: SequenceSpec) -> None:
        with self.event() as model:
            for each in specs:
                model.submit(self.now_s, each)

    def abort(self, request_id: str) -> bool:
        with self.event() as model:
            return model.abort(self.now_s, request_id)

    @contextmanager
    def event(self) -> Iterator[WorkerModel]:
        """Something happens now; it takes part in the next plan, which is made at once if it can be."""
        if self.model.step is not None and (result := self.model.cut_step(self.now_s)):
            self._write_down(result)
        yield self.model
        if self.model.step is None:
            self._plan()

    def run(self, until_s: float = float("inf")) -> None:
        """Runs until nothing is left to happen, or up to a time."""
        while (next_s := self._next_event_s()) is not None and next_s <= until_s:
            self.now_s = next_s
            if self.model.step is not None and self.model.step.end_s == next_s:
                self.steps.append(self.model.step)
                self._write_down(self.model.finish_step(next_s))
                self._plan()
            elif self._arrivals and self._arrivals[0][0] == next_s:
                _, request_id, ok = heapq.heappop(self._arrivals)
                with self.event() as model:
                    model.kv_arrived(next_s, request_id, ok=ok)
            else:
                with self.event() as model:
                    self.expired += model.expire_leases(next_s)
            load = self.load()
            assert 0 <= load.kv_used_blocks <= self.model.config.num_kv_blocks
            assert 0 <= load.num_running <= self.model.config.max_num_seqs
            assert load.num_waiting >= 0
            assert load.waiting_prefill_tokens >= 0
        if until_s < float("inf"):
            self.now_s = until_s

    def load(self) -> WorkerLoad:
        return self.model.load(self.now_s)

    def _next_event_s(self) -> float | None:
        times_s = [self._arrivals[0][0]] if self._arrivals else []
        if self.model.step is not None:
            times_s.append(self.model.step.end_s)
        if (deadline_s := self.model.next_deadline_s()) is not None:
            times_s.append(deadline_s)
        return min(times_s, default=None)

    def _plan(self) -> None:
        plan = self.model.plan_step(self.now_s, self._max_decode_steps)
        for pull in plan.pulls:
            heapq.heappush(self._arrivals, (self.now_s + self._pull_s, pull.request_id, self.pulls_succeed))
        self.pulls += plan.pulls
        self.unneeded_pulls += plan.unneeded_pulls
        self.preempted += plan.preempted

    def _write_down(self, result: StepResult) -> None:
        for request_id in result.decoded:
            self.token_times_s[request_id] += result.ends_s
        for first in result.prefilled:
            self.token_times_s.setdefault(first.request_id, []).append(self.now_s)
            self.prefilled.setdefault(first.request_id, first)
        for finished in result.finished:
            assert finished.request_id not in self.finished
            assert finished.num_tokens == len(self.token_times_s[finished.request_id])
            self.finished[finished.request_id] = finished


def chunk_sizes(steps: Sequence[Step]) -> list[list[int]]:
    return [[chunk.num_tokens for chunk in step.prefills] for step in steps]
