"""Step times that learn from observed steps how far a profile is off."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Literal

from core.errors import ConfigError
from core.observed_steps import StepObservation
from core.performance_model import PrefillChunk, StepTime

Phase = Literal["prefill", "decode"]

_PRIOR_WEIGHT = 2.0
"""The profile's own word counts as this many observations when nothing has been observed."""
_KEPT_HALF_LIVES = 5
"""Older observations weigh less than 4 % of a new one and are forgotten."""
_LEAST_SHARE = 0.5
"""Of a step's time that prompts must add to it for the step to say something about prompts."""


class CorrectedStepTime(StepTime):
    """Another step time, multiplied by one factor a phase that follows observations.

    A factor is the weighted median of the observed ratios; an observation's weight halves every
    ``half_life`` later ones of its phase. A median moves with a lasting change after about one
    half-life, and a few absurd observations do not move it. Factors start at 1.

    Args:
        step_time: what to correct; it is asked uncorrected.
        half_life: observations.

    Raises:
        ConfigError: ``half_life`` is below 1.
    """

    def __init__(self, step_time: StepTime, *, half_life: int = 16) -> None:
        if half_life < 1:
            raise ConfigError(f"half_life must be at least 1 observation, not {half_life}")
        self.step_time = step_time
        self._ratios: dict[Phase, _MedianRatio] = {
            "prefill": _MedianRatio(half_life),
            "decode": _MedianRatio(half_life),
        }
        self._prefill_factor = 1.0
        self._decode_factor = 1.0
        self._half_life = half_life
        self._num_new = 0
        """Observations since the factors were computed: that is done when they are asked for."""
        self._twin: CorrectedStepTime | None = None

    @property
    def prefill_factor(self) -> float:
        self._update()
        return self._prefill_factor

    @property
    def decode_factor(self) -> float:
        self._update()
        return self._decode_factor

    def pair_with(self, twin: CorrectedStepTime) -> None:
        """What is seen of either is what the other one starts from, instead of 1."""
        self._twin, twin._twin = twin, self
        self._num_new += 1
        twin._num_new += 1

    def observe(self, *, phase: Phase, predicted_s: float, observed_s: float) -> None:
        """Learns from one step or from the mean of a few.

        Times that are not positive and finite say nothing and are ignored.

        Args:
            phase: ``decode`` for steps that only decode, else ``prefill``.
            predicted_s: what the wrapped, uncorrected ``step_time`` gives.
            observed_s: what it took.
        """
        if not (0 < predicted_s < math.inf and 0 < observed_s < math.inf):
            return
        self._ratios[phase].add(observed_s / predicted_s)
        self._num_new += 1
        if self._twin is not None:
            self._twin._num_new += 1

    def observe_steps(self, steps: Sequence[StepObservation]) -> None:
        """Learns from a few steps of one worker: all of a phase together are one observation.

        From a step with both prompts and decodes, what is left of its time after the decodes' own is
        taken for the prompts', unless it is the smaller part of what was predicted.
        """
        if self._num_new >= self._half_life:
            self._update()
        predict = self.step_time.step_s
        decode_predicted_s = decode_observed_s = 0.0
        prefill_predicted_s = prefill_observed_s = 0.0
        for step in steps:
            predicted_s = predict(step.prefills, step.num_decoding, step.decode_kv_tokens)
            if not step.prefills:
                decode_predicted_s += predicted_s
                decode_observed_s += step.seconds
            elif not step.num_decoding:
                prefill_predicted_s += predicted_s
                prefill_observed_s += step.seconds
            else:
                decode_s = predict((), step.num_decoding, step.decode_kv_tokens)
                if predicted_s - decode_s >= _LEAST_SHARE * predicted_s:
                    prefill_predicted_s += predicted_s - decode_s
                    prefill_observed_s += step.seconds - self._decode_factor * decode_s
        self.observe(phase="decode", predicted_s=decode_predicted_s, observed_s=decode_observed_s)
        self.observe(phase="prefill", predicted_s=prefill_predicted_s, observed_s=prefill_observed_s)

    def _update(self) -> None:
        if self._num_new:
            self._num_new = 0
            self._prefill_factor = self._factor("prefill")
            self._decode_factor = self._factor("decode")

    def _factor(self, phase: Phase) -> float:
        prior = 1.0 if self._twin is None else self._twin._ratios[phase].median(1.0)
        return self._ratios[phase].median(prior)

    def step_s(self, prefills: Sequence[PrefillChunk], num_decoding: int, decode_kv_tokens: int) -> float:
        """The decodes' own time by the decode factor, what the prompts add by the prefill factor."""
        if self._num_new:
            self._update()
        step_s = self.step_time.step_s(prefills, num_decoding, decode_kv_tokens)
        if not prefills:
            return self._decode_factor * step_s
        if not num_decoding:
            return self._prefill_factor * step_s
        decode_s = self.step_time.step_s((), num_decoding, decode_kv_tokens)
        return self._decode_factor * decode_s + self._prefill_factor * (step_s - decode_s)

    def decode_ends_s(
        self, start_s: float, num_decoding: int, decode_kv_tokens: int, num_steps: int
    ) -> array[float]:
        if self.decode_factor == 1.0:
            return self.step_time.decode_ends_s(start_s, num_decoding, decode_kv_tokens, num_steps)
        return super().decode_ends_s(start_s, num_decoding, decode_kv_tokens, num_steps)


class _MedianRatio:
    """The median of the last ratios, newer ones weighing more, beside a ratio from the start."""

    def __init__(self, half_life: int) -> None:
        self._decay = 0.5 ** (1 / half_life)
        self._ratios: deque[float] = deque(maxlen=_KEPT_HALF_LIVES * half_life)
        self._prior_weight = _PRIOR_WEIGHT

    def add(self, ratio: float) -> None:
        self._ratios.append(ratio)
        self._prior_weight *= self._decay

    def median(self, prior: float) -> float:
        """The ratio at half of the weight; ``prior`` stands for what nobody has observed."""
        weighted = [(prior, self._prior_weight)]
        weight = 1.0
        for ratio in reversed(self._ratios):
            weighted.append((ratio, weight))
            weight *= self._decay
        weighted.sort()
        half = sum(weight for _, weight in weighted) / 2
        passed = 0.0
        for ratio, weight in weighted:
            passed += weight
            if passed >= half:
                return ratio
        raise AssertionError("weights add up")
