"""Step times by (shape, role), each ready to be corrected by what is observed."""

from __future__ import annotations

from collections.abc import Callable

from core.corrected_step_time import CorrectedStepTime
from core.performance_model import PrefillChunk, StepTime
from core.types import Role

StepTimeOfShape = Callable[[str], StepTime | None]
"""Shape name to its step time; None where there is no profile."""


class StepTimes:
    """One corrected step time for each shape and role, made when it is first asked for."""

    def __init__(self, of_shape: StepTimeOfShape = lambda shape: None) -> None:
        self._of_shape = of_shape
        self._by_key: dict[tuple[str, Role], CorrectedStepTime | None] = {}

    def of(self, shape: str, role: Role) -> CorrectedStepTime | None:
        """The step time of workers of this shape that have this role now."""
        key = (shape, role)
        if key not in self._by_key:
            step_time = self._of_shape(shape)
            self._by_key[key] = None if step_time is None else CorrectedStepTime(step_time)
        return self._by_key[key]


def prefill_s(step_time: StepTime, prompt_tokens: int, cached_tokens: int) -> float:
    """Seconds a worker computes until a prompt's first token, with nothing else to do."""
    cached = max(0, min(cached_tokens, prompt_tokens - 1))
    chunk = PrefillChunk(context_tokens=cached, num_tokens=prompt_tokens - cached, ends_prompt=True)
    return step_time.step_s((chunk,), 0, 0)
