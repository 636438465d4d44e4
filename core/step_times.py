"""Step times by (shape, role): profiles corrected by what is observed, or learned from that alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.corrected_step_time import CorrectedStepTime
from core.learned_step_time import LearnedStepTime
from core.observed_steps import StepObservation
from core.performance_model import PrefillChunk, StepTime
from core.types import Role

StepTimeOfShape = Callable[[str], StepTime | None]
"""Shape name to its step time; None where there is no profile."""


class StepTimes:
    """One step time for each shape and role, made when it is first asked for.

    A profile is corrected for each role by itself; without one, both roles together teach what a step takes.
    """

    def __init__(self, of_shape: StepTimeOfShape = lambda shape: None) -> None:
        self._of_shape = of_shape
        self._by_key: dict[tuple[str, Role], CorrectedStepTime | LearnedStepTime] = {}

    def of(self, shape: str, role: Role) -> StepTime | None:
        """The step time of workers of this shape that have this role now; None while too little is known."""
        step_time = self._teachable(shape, role)
        return None if isinstance(step_time, LearnedStepTime) and not step_time.is_known else step_time

    def _teachable(self, shape: str, role: Role) -> CorrectedStepTime | LearnedStepTime:
        key = (shape, role)
        if key not in self._by_key:
            self._make(shape)
        return self._by_key[key]

    def _make(self, shape: str) -> None:
        step_time = self._of_shape(shape)
        if step_time is None:
            learned = LearnedStepTime()
            self._by_key.update({(shape, role): learned for role in Role})
            return
        prefill, decode = CorrectedStepTime(step_time), CorrectedStepTime(step_time)
        # One kind of machine: until decode workers prefill by themselves, prefill workers tell how that is.
        prefill.pair_with(decode)
        self._by_key.update({(shape, Role.PREFILL): prefill, (shape, Role.DECODE): decode})

    def observe(self, shape: str, role: Role, steps: Sequence[StepObservation]) -> None:
        """Learns from steps that one worker has run in this role."""
        if steps:
            self._teachable(shape, role).observe_steps(steps)


def prefill_s(step_time: StepTime, prompt_tokens: int, cached_tokens: int) -> float:
    """Seconds a worker computes until a prompt's first token, with nothing else to do."""
    cached = max(0, min(cached_tokens, prompt_tokens - 1))
    chunk = PrefillChunk(context_tokens=cached, num_tokens=prompt_tokens - cached, ends_prompt=True)
    return step_time.step_s((chunk,), 0, 0)


def queued_prefill_s(
    step_time: StepTime, prompt_tokens: int, cached_tokens: int, max_num_batched_tokens: int
) -> float:
    """Seconds a prompt adds to a queue of prompts: full steps share what a step costs for itself."""
    alone_s = prefill_s(step_time, prompt_tokens, cached_tokens)
    base_s = prefill_s(step_time, 1, 0)
    full_s = prefill_s(step_time, max(max_num_batched_tokens, prompt_tokens), 0)
    if full_s <= base_s:
        return alone_s
    return max(alone_s - base_s, 0.0) * full_s / (full_s - base_s)
