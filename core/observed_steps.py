"""Engine steps as they were observed: what they computed, and how long they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.performance_model import PrefillChunk, StepTime


@dataclass(frozen=True, slots=True, kw_only=True)
class StepObservation:
    """One step; the parts are what ``StepTime.step_s`` takes."""

    prefills: tuple[PrefillChunk, ...] = ()
    num_decoding: int = 0
    decode_kv_tokens: int = 0
    seconds: float
    """From the end of the step before, or from the step's start if the engine was idle, to its end."""


class StepSample:
    """The first few steps since they were last taken, as many with prompts as without.

    Args:
        num_of_a_kind: with prompts, and as many without.
    """

    def __init__(self, num_of_a_kind: int = 2) -> None:
        self._num_of_a_kind = num_of_a_kind
        self._steps: list[StepObservation] = []
        self._num_wanted = [num_of_a_kind, num_of_a_kind]

    def wants(self, prefills: Sequence[PrefillChunk]) -> bool:
        """Whether one more step with, or without, prompts would be kept."""
        return self._num_wanted[bool(prefills)] > 0

    def add(self, step: StepObservation) -> None:
        """Keeps the step if it is wanted."""
        kind = bool(step.prefills)
        if self._num_wanted[kind] > 0:
            self._num_wanted[kind] -= 1
            self._steps.append(step)

    def take(self) -> tuple[StepObservation, ...]:
        """The steps kept, in order; from now on others are."""
        if not self._steps:
            return ()
        steps = tuple(self._steps)
        self._steps.clear()
        self._num_wanted = [self._num_of_a_kind, self._num_of_a_kind]
        return steps


class SampledStepTime(StepTime):
    """Another step time, and a sample of the steps it was asked for."""

    def __init__(self, step_time: StepTime) -> None:
        self._step_time = step_time
        self.steps = StepSample()

    def step_s(self, prefills: Sequence[PrefillChunk], num_decoding: int, decode_kv_tokens: int) -> float:
        step_s = self._step_time.step_s(prefills, num_decoding, decode_kv_tokens)
        if self.steps.wants(prefills):
            self.steps.add(
                StepObservation(
                    prefills=tuple(prefills),
                    num_decoding=num_decoding,
                    decode_kv_tokens=decode_kv_tokens,
                    seconds=step_s,
                )
            )
        return step_s
