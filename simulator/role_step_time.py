"""How long a simulated worker's steps take, and what it notes of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from core.observed_steps import StepObservation, StepSample
from core.performance_model import PrefillChunk, StepTime
from core.types import Role
from simulator.spec import WorkerGroup


class RoleStepTime(StepTime):
    """The step time of the role a worker has now.

    It also notes how much of it is extrapolated, and a sample of the steps for the next heartbeat.
    """

    def __init__(self, group: WorkerGroup, role: Role) -> None:
        self._group = group
        self.computed_s = 0.0
        self.extrapolated_s = 0.0
        self.steps = StepSample(num_of_a_kind=1)
        self.set_role(role)

    def set_role(self, role: Role) -> None:
        self.steps.take()
        self._step_time = self._group.step_time[role]
        self._is_extrapolated = getattr(self._step_time, "is_extrapolated", None)

    def step_s(self, prefills: Sequence[PrefillChunk], num_decoding: int, decode_kv_tokens: int) -> float:
        step_s = self._step_time.step_s(prefills, num_decoding, decode_kv_tokens)
        self._note(step_s, prefills, num_decoding, decode_kv_tokens)
        if self.steps.wants(prefills):
            self._sample(step_s, prefills, num_decoding, decode_kv_tokens)
        return step_s

    def decode_ends_s(
        self, start_s: float, num_decoding: int, decode_kv_tokens: int, num_steps: int
    ) -> array[float]:
        ends_s = self._step_time.decode_ends_s(start_s, num_decoding, decode_kv_tokens, num_steps)
        self._note(ends_s[-1] - start_s, (), num_decoding, decode_kv_tokens)
        if self.steps.wants(()):
            step_s = self._step_time.step_s((), num_decoding, decode_kv_tokens)
            self._sample(step_s, (), num_decoding, decode_kv_tokens)
        return ends_s

    def _note(
        self, seconds: float, prefills: Sequence[PrefillChunk], num_decoding: int, kv_tokens: int
    ) -> None:
        self.computed_s += seconds
        if self._is_extrapolated is not None and self._is_extrapolated(prefills, num_decoding, kv_tokens):
            self.extrapolated_s += seconds

    def _sample(
        self, seconds: float, prefills: Sequence[PrefillChunk], num_decoding: int, kv_tokens: int
    ) -> None:
        self.steps.add(
            StepObservation(
                prefills=tuple(prefills),
                num_decoding=num_decoding,
                decode_kv_tokens=kv_tokens,
                seconds=seconds,
            )
        )
