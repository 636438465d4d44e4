"""Step times learned from observed steps alone, where nobody has measured a profile."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from core.observed_steps import StepObservation
from core.performance_model import LinearStepTime, PrefillChunk, StepTime
from core.profile_fit import non_negative_least_squares

_KEPT_STEPS = 64
"""Of a kind: the latest with prompts, and the latest without."""
_ENOUGH_STEPS = 8
"""Of each kind, before anything is predicted."""
_FIT_EVERY = 16
"""Observations between two fits; a fit takes a few milliseconds."""
_ABSURD = 3.0
"""An observation that is off by this factor either way takes no part in the last fit."""
_NUM_ROUGH_FITS = 3


class LearnedStepTime(StepTime):
    """A linear step time (:class:`core.performance_model.LinearStepTime`) fitted to the latest observations.

    It is fitted for least relative error, without what rougher fits before it find absurd (a step that was
    interrupted, a clock that jumped).
    """

    def __init__(self) -> None:
        self._with_prompts: deque[StepObservation] = deque(maxlen=_KEPT_STEPS)
        self._without: deque[StepObservation] = deque(maxlen=_KEPT_STEPS)
        self._num_new = 0
        self._fitted: LinearStepTime | None = None

    @property
    def is_known(self) -> bool:
        """True once enough steps of either kind were observed."""
        return self._fitted is not None

    def observe_steps(self, steps: Sequence[StepObservation]) -> None:
        """Learns from a few steps; times that are not positive and finite say nothing and are ignored."""
        for step in steps:
            if 0 < step.seconds < math.inf:
                (self._with_prompts if step.prefills else self._without).append(step)
                self._num_new += 1
        enough = min(len(self._with_prompts), len(self._without)) >= _ENOUGH_STEPS
        if enough and (self._fitted is None or self._num_new >= _FIT_EVERY):
            self._num_new = 0
            self._fitted = _fit([*self._with_prompts, *self._without])

    def step_s(self, prefills: Sequence[PrefillChunk], num_decoding: int, decode_kv_tokens: int) -> float:
        """
        Raises:
            ValueError: nothing is known yet.
        """
        if self._fitted is None:
            raise ValueError("too few steps were observed: ask is_known first")
        return self._fitted.step_s(prefills, num_decoding, decode_kv_tokens)


def _fit(steps: Sequence[StepObservation]) -> LinearStepTime:
    seconds = np.array([step.seconds for step in steps])
    rows = np.array([_row(step) for step in steps], dtype=np.float64)
    # Divided by the larger of predicted and observed, no single observation counts for more than 1.
    larger = np.maximum(seconds, np.median(seconds))
    for _ in range(_NUM_ROUGH_FITS):
        rough = non_negative_least_squares(rows / larger[:, None], seconds / larger)
        larger = np.maximum(seconds, rows @ rough)
    ratio = (rows @ rough) / seconds
    sane = (ratio > 1 / _ABSURD) & (ratio < _ABSURD)
    if sane.sum() < _ENOUGH_STEPS:
        sane = np.ones_like(sane)
    rows, seconds = rows[sane], seconds[sane]
    fitted = non_negative_least_squares(rows / seconds[:, None], np.ones(len(seconds)))
    base, per_seq, per_kv_token, per_token2, per_token, prompt = (1e3 * float(x) for x in fitted)
    return LinearStepTime(
        prefill_ms_per_token2=per_token2,
        prefill_ms_per_token=per_token,
        prefill_base_ms=base + prompt,
        decode_base_ms=base,
        decode_ms_per_seq=per_seq,
        decode_ms_per_kv_token=per_kv_token,
    )


def _row(step: StepObservation) -> tuple[float, ...]:
    """What :class:`LinearStepTime` multiplies its six coefficients with."""
    tokens2 = sum(chunk.num_tokens * (2 * chunk.context_tokens + chunk.num_tokens) for chunk in step.prefills)
    return (
        1.0,
        step.num_decoding,
        step.decode_kv_tokens,
        tokens2,
        sum(chunk.num_tokens for chunk in step.prefills),
        any(chunk.ends_prompt for chunk in step.prefills),
    )
