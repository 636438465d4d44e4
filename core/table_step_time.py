"""Step times from measured points: exact where measured, a sane fit's trend everywhere else.

A fit with non-negative coefficients gives the shape; a residual (measured over fitted) is interpolated
between the points and held constant beyond them.

    prefill   T(n) = fit(n) * residual(n), as a table made monotone; a chunk costs T(c + n) - T(c)
    decode    values on a grid of (batch, KV tokens), bilinear in between; so for one batch a piecewise
              linear function of KV tokens, kept per batch because the batch changes rarely

Prompts measured behind cached tokens help the prefill fit only. The residual leaves them out: their
base and the cost of their chunk cannot be told apart, and chunks would no longer add up to the prompt.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from core.performance_model import PrefillChunk, StepTime
from core.profile_fit import Floats, fit_decode_s, fit_prefill_s

if TYPE_CHECKING:
    from core.performance_profile import DecodePoint, PerformanceProfile, PrefillPoint

_PIECES = 16
"""Straight pieces of the prefill curve between two measured lengths."""
_MAX_KNOTS = 128
"""Most batches, and most KV sizes, of the decode grid."""
_SAME = 0.001
"""Decode points whose batch and KV are this near in logarithm share a knot; their residuals are averaged."""
_FEW_STEPS = 32
"""From here on numpy adds up steps faster than a loop."""
_NUM_NEIGHBOURS = 4
"""Measured points that decide the residual of a knot where nothing was measured."""


class TableStepTime(StepTime):
    """The step times of a profile.

    A step pays the prefill constant if a prompt ends in it, else the decode constant. One prompt alone
    in one chunk costs what was measured; so does a decode step. A step with both costs the sum of its
    parts with one constant, and never less than its decodes alone.
    """

    def __init__(self, profile: PerformanceProfile) -> None:
        self._prefill = _PrefillCurve(profile.prefill)
        self._decode = _DecodeGrid(profile.decode)
        self._max_prompt_tokens = max(point.prompt_tokens for point in profile.prefill)
        self._max_num_decoding = max(point.num_decoding for point in profile.decode)
        self._max_kv_tokens = max(point.kv_tokens for point in profile.decode)
        self._prefill_base_s = self._prefill.prompt_s(0)
        self._decode_base_s = self._decode.line(0).step_s(0)

    def step_s(self, prefills: Sequence[PrefillChunk], num_decoding: int, decode_kv_tokens: int) -> float:
        if not prefills:
            return self._decode_s(num_decoding, decode_kv_tokens) if num_decoding else self._decode_base_s
        prompt_s = self._prefill.prompt_s
        step_s = 0.0
        ends_prompt = False
        for chunk in prefills:
            context_tokens = chunk.context_tokens
            step_s += prompt_s(context_tokens + chunk.num_tokens) - prompt_s(context_tokens)
            ends_prompt |= chunk.ends_prompt
        step_s += self._prefill_base_s if ends_prompt else self._decode_base_s
        if not num_decoding:
            return step_s
        decode_s = self._decode_s(num_decoding, decode_kv_tokens)
        return max(step_s + decode_s - self._decode_base_s, decode_s)

    def _decode_s(self, num_decoding: int, kv_tokens: int) -> float:
        line = self._decode.lines.get(num_decoding) or self._decode.line(num_decoding)
        index = bisect_right(line.knots, kv_tokens)
        return line.intercepts[index] + line.slopes[index] * kv_tokens

    def decode_ends_s(
        self, start_s: float, num_decoding: int, decode_kv_tokens: int, num_steps: int
    ) -> array[float]:
        line = self._decode.lines.get(num_decoding) or self._decode.line(num_decoding)
        knots = line.knots
        last_kv_tokens = decode_kv_tokens + num_decoding * num_steps
        ends_s = array("d")
        while decode_kv_tokens < last_kv_tokens:
            index = bisect_right(knots, decode_kv_tokens)
            intercept, slope = line.intercepts[index], line.slopes[index]
            limit = min(last_kv_tokens, knots[index]) if index < len(knots) else last_kv_tokens
            piece = range(decode_kv_tokens, limit, num_decoding)
            if len(piece) < _FEW_STEPS:
                for kv_tokens in piece:
                    start_s += intercept + slope * kv_tokens
                    ends_s.append(start_s)
            else:
                steps_s = intercept + slope * np.arange(decode_kv_tokens, limit, num_decoding)
                steps_s[0] += start_s
                ends_s.frombytes(steps_s.cumsum().tobytes())
                start_s = ends_s[-1]
            decode_kv_tokens += len(piece) * num_decoding
        return ends_s

    def is_extrapolated(self, prefills: Sequence[PrefillChunk], num_decoding: int, kv_tokens: int) -> bool:
        """True above what was measured: a longer prompt, a larger batch, or more KV than any point's.

        Below the smallest points a step costs little more than its constant, which they show well.
        """
        return (
            num_decoding > self._max_num_decoding
            or kv_tokens > self._max_kv_tokens
            or any(chunk.context_tokens + chunk.num_tokens > self._max_prompt_tokens for chunk in prefills)
        )


class _PrefillCurve:
    """T(n): seconds of a whole prompt of n tokens, never falling, piecewise linear where measured."""

    def __init__(self, points: Sequence[PrefillPoint]) -> None:
        base_s, per_token_s, per_token2_s = self._fit = fit_prefill_s(points)

        def fit_s(num_tokens: Floats) -> Floats:
            return base_s + per_token_s * num_tokens + per_token2_s * num_tokens**2

        seconds = defaultdict(list)
        for point in points:
            if not point.context_tokens:
                seconds[point.prompt_tokens].append(point.seconds)
        lengths = np.array(sorted(seconds), dtype=np.float64)
        measured = _never_falling([sum(seconds[length]) / len(seconds[length]) for length in sorted(seconds)])
        residuals = measured / fit_s(lengths)
        self._last_residual = float(residuals[-1])
        self._last_tokens = int(lengths[-1])

        ends = np.concatenate([[0.0], lengths])
        knots = np.unique(np.linspace(ends[:-1], ends[1:], _PIECES, endpoint=False).round())
        knots = np.union1d(knots, ends)
        curve = fit_s(knots) * np.interp(knots, lengths, residuals)
        # A falling residual can bend the curve down between two points; it stays between their times.
        piece = np.clip(np.searchsorted(lengths, knots, side="left"), 0, len(lengths) - 1)
        curve = np.maximum.accumulate(np.minimum(curve, measured[piece]))
        slopes = np.diff(curve) / np.diff(knots)
        self._knots: list[int] = [int(knot) for knot in knots]
        self._values_s: list[float] = curve.tolist()
        self._slopes: list[float] = slopes.tolist()

    def prompt_s(self, num_tokens: int) -> float:
        if num_tokens >= self._last_tokens:
            base_s, per_token_s, per_token2_s = self._fit
            return self._last_residual * (base_s + num_tokens * (per_token_s + per_token2_s * num_tokens))
        index = bisect_right(self._knots, num_tokens) - 1
        return self._values_s[index] + self._slopes[index] * (num_tokens - self._knots[index])


def _never_falling(values: Sequence[float]) -> Floats:
    """The nearest sequence that never falls: neighbours in the wrong order become their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        size = 1
        while pools and pools[-1][0] > value:
            mean, num = pools.pop()
            value = (value * size + mean * num) / (size + num)
            size += num
        pools.append((value, size))
    return np.array([value for value, size in pools for _ in range(size)])


@dataclass(frozen=True, slots=True)
class _Line:
    """Seconds of a decode step of one batch, by KV tokens: intercept + slope * KV between two knots."""

    knots: list[int]
    intercepts: list[float]
    """One more than knots: ``intercepts[i]`` holds from ``knots[i - 1]`` up to below ``knots[i]``."""
    slopes: list[float]

    def step_s(self, kv_tokens: int) -> float:
        index = bisect_right(self.knots, kv_tokens)
        return self.intercepts[index] + self.slopes[index] * kv_tokens


class _DecodeGrid:
    """Residuals on all measured batches times all measured KV sizes, and the lines made of them."""

    def __init__(self, points: Sequence[DecodePoint]) -> None:
        self._fit = fit_decode_s(points)
        self.lines: dict[int, _Line] = {}
        self._batches = _thin({point.num_decoding for point in points})
        self._kvs = _thin({point.kv_tokens for point in points})
        self._residuals = self._fill(points)

    def _fit_s(self, num_decoding: int, kv_tokens: int) -> float:
        base_s, per_seq_s, per_kv_token_s = self._fit
        return base_s + per_seq_s * num_decoding + per_kv_token_s * kv_tokens

    def _fill(self, points: Sequence[DecodePoint]) -> list[list[float]]:
        """Residuals by batch and KV: the measured one, else neighbours weighted by inverse distance."""
        log_batches = np.log(self._batches)
        log_kvs = np.log1p(self._kvs)
        measured: dict[tuple[int, int], list[float]] = defaultdict(list)
        for point in points:
            batch = int(np.abs(log_batches - math.log(point.num_decoding)).argmin())
            kv = int(np.abs(log_kvs - math.log1p(point.kv_tokens)).argmin())
            measured[batch, kv].append(
                math.log(point.seconds / self._fit_s(point.num_decoding, point.kv_tokens))
            )
        seen = {place: sum(logs) / len(logs) for place, logs in measured.items()}
        seen_log_batches = log_batches[[batch for batch, _ in seen]]
        seen_log_kvs = log_kvs[[kv for _, kv in seen]]
        seen_logs = np.array(list(seen.values()))
        num = min(_NUM_NEIGHBOURS, len(seen))
        residuals = []
        for batch, log_batch in enumerate(log_batches):
            distances2 = (log_kvs[:, None] - seen_log_kvs) ** 2 + (log_batch - seen_log_batches) ** 2
            nearest = np.argsort(distances2, axis=1, kind="stable")[:, :num]
            weights = 1 / (np.take_along_axis(distances2, nearest, axis=1) + 1e-9)
            logs = (weights * seen_logs[nearest]).sum(axis=1) / weights.sum(axis=1)
            row: list[float] = np.exp(logs).tolist()
            for kv in range(len(row)):
                if (batch, kv) in seen:
                    row[kv] = math.exp(seen[batch, kv])
            residuals.append(row)
        return residuals

    def line(self, num_decoding: int) -> _Line:
        """The line of one batch, computed once."""
        if num_decoding in self.lines:
            return self.lines[num_decoding]
        kvs = self._kvs
        values_s = self._values_s(num_decoding)
        per_kv_token_s = self._fit[2]
        slopes = [per_kv_token_s * values_s[0] / self._fit_s(num_decoding, kvs[0])]
        for index in range(1, len(kvs)):
            rise_s = values_s[index] - values_s[index - 1]
            slopes.append(rise_s / (kvs[index] - kvs[index - 1]))
        slopes.append(per_kv_token_s * values_s[-1] / self._fit_s(num_decoding, kvs[-1]))
        starts = [0, *range(len(kvs))]
        intercepts = [
            values_s[start] - slope * kvs[start] for start, slope in zip(starts, slopes, strict=True)
        ]
        line = self.lines[num_decoding] = _Line(kvs, intercepts, slopes)
        return line

    def _values_s(self, num_decoding: int) -> list[float]:
        """Seconds at each KV knot: linear between two batches, the fit times the last residual beyond."""
        batches = self._batches
        upper = bisect_right(batches, num_decoding)
        if upper in (0, len(batches)):
            row = self._residuals[max(0, upper - 1)]
            return [
                self._fit_s(num_decoding, kv) * residual for kv, residual in zip(self._kvs, row, strict=True)
            ]
        low, high = batches[upper - 1], batches[upper]
        share = (num_decoding - low) / (high - low)
        rows = zip(self._kvs, self._residuals[upper - 1], self._residuals[upper], strict=True)
        return [
            (1 - share) * self._fit_s(low, kv) * below + share * self._fit_s(high, kv) * above
            for kv, below, above in rows
        ]


def _thin(values: set[int]) -> list[int]:
    """Sorted knots, at most ``_MAX_KNOTS``: of neighbours nearer than a growing distance the first stays."""
    distance = _SAME
    while True:
        knots: list[int] = []
        for value in sorted(values):
            if not knots or math.log1p(value) - math.log1p(knots[-1]) > distance:
                knots.append(value)
        if len(knots) <= _MAX_KNOTS:
            return knots
        distance *= 1.25
