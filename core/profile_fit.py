"""Least-squares fits of measured step times whose coefficients are never negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from core.performance_model import LinearStepTime, PrefillChunk

if TYPE_CHECKING:
    from core.performance_profile import DecodePoint, PerformanceProfile, PrefillPoint

Floats = npt.NDArray[np.float64]

_BASE_SHARE = 0.01
"""A fit's constant is at least this share of the shortest measured time, so that it is positive at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFit:
    """A linear fit, with (predicted - measured) / measured of each point in the profile's order."""

    step_time: LinearStepTime
    prefill_errors: tuple[float, ...]
    decode_errors: tuple[float, ...]


def fit_linear(profile: PerformanceProfile) -> LinearFit:
    """Fits a profile's points with least relative error."""
    prefill = fit_prefill_s(profile.prefill)
    decode = fit_decode_s(profile.decode)
    step_time = LinearStepTime(
        prefill_ms_per_token2=prefill[2] * 1e3,
        prefill_ms_per_token=prefill[1] * 1e3,
        prefill_base_ms=prefill[0] * 1e3,
        decode_base_ms=decode[0] * 1e3,
        decode_ms_per_seq=decode[1] * 1e3,
        decode_ms_per_kv_token=decode[2] * 1e3,
    )
    prefill_errors = []
    for prompt in profile.prefill:
        chunk = PrefillChunk(
            context_tokens=prompt.context_tokens,
            num_tokens=prompt.prompt_tokens - prompt.context_tokens,
            ends_prompt=True,
        )
        prefill_errors.append(step_time.step_s((chunk,), 0, 0) / prompt.seconds - 1)
    decode_errors = [
        step_time.step_s((), step.num_decoding, step.kv_tokens) / step.seconds - 1 for step in profile.decode
    ]
    return LinearFit(
        step_time=step_time, prefill_errors=tuple(prefill_errors), decode_errors=tuple(decode_errors)
    )


def fit_prefill_s(points: Sequence[PrefillPoint]) -> tuple[float, float, float]:
    """Seconds of a prompt: constant, per token, per token squared.

    A prompt of n tokens of which c were cached costs constant + a (n - c) + b (n^2 - c^2).
    """
    total = np.array([point.prompt_tokens for point in points], dtype=np.float64)
    cached = np.array([point.context_tokens for point in points], dtype=np.float64)
    return _fit(total - cached, total**2 - cached**2, [point.seconds for point in points])


def fit_decode_s(points: Sequence[DecodePoint]) -> tuple[float, float, float]:
    """Seconds of a decode step: constant, per sequence, per KV token."""
    num_decoding = np.array([point.num_decoding for point in points], dtype=np.float64)
    kv_tokens = np.array([point.kv_tokens for point in points], dtype=np.float64)
    return _fit(num_decoding, kv_tokens, [point.seconds for point in points])


def _fit(first: Floats, second: Floats, seconds: Sequence[float]) -> tuple[float, float, float]:
    measured = np.array(seconds, dtype=np.float64)
    base = _BASE_SHARE * float(measured.min())
    columns = np.stack([np.ones_like(measured), first, second], axis=1)
    # Rows divided by the measured time: least relative error.
    solution = non_negative_least_squares(columns / measured[:, None], (measured - base) / measured)
    return base + float(solution[0]), float(solution[1]), float(solution[2])


def non_negative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """The x >= 0 with the least ``|matrix @ x - target|``, for a few columns.

    The solution is the plain least-squares solution on the columns where it is positive, so trying
    every set of columns finds it. Smaller sets win ties.

    Args:
        matrix: (rows, columns).
        target: (rows,).
    """
    num_columns = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    best = np.zeros(num_columns)
    best_error = float(target @ target)
    for size in range(1, num_columns + 1):
        for chosen in combinations(range(num_columns), size):
            columns = list(chosen)
            part = np.linalg.lstsq(matrix[:, columns] / scale[columns], target, rcond=None)[0]
            if (part < 0).any():
                continue
            candidate = np.zeros(num_columns)
            candidate[columns] = part / scale[columns]
            error = float(np.sum((matrix @ candidate - target) ** 2))
            if error < best_error - 1e-15 * float(target @ target):
                best, best_error = candidate, error
    return best
