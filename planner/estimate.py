"""The load of now, estimated from what routers have counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.answer_lengths import answer_lengths
from planner.demand import Demand, PromptKind
from planner.level import Measured, means_apart, widest_unchanged
from planner.traffic_history import TrafficSample

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WINDOWS_S = (2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0)
"""Candidates, shortest first."""
MIN_REQUESTS = 8
"""Fewer in the whole history say nothing."""
DISPERSION_SAMPLES = 120
_MAX_DISPERSION = 100.0
_CLASS_SPREAD = 0.1
"""Standard deviation of lengths inside a class, as a share of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A demand and how sure it is: standard errors as shares of the figure."""

    demand: Demand
    rate_error: float
    prompt_error: float
    """Of the prompt tokens a second."""
    answer_error: float
    """Of the mean answer."""
    window_s: float
    """Over which the rate was taken."""


def estimate(samples: Sequence[TrafficSample]) -> Estimate | None:
    """The load at the end of the samples; None if they hold too few requests."""
    if sum(sample.num_arrived for sample in samples) < MIN_REQUESTS:
        return None
    seconds = np.array([sample.seconds for sample in samples])
    arrived = np.array([sample.num_arrived for sample in samples], dtype=float)
    tokens = np.array([float(_new_tokens(sample)) for sample in samples])
    starts = _starts(seconds)
    dispersion, token_dispersion = _dispersion(arrived), _dispersion(tokens)
    prompts = np.array([sample.prompts[:2] for sample in samples], dtype=float)

    def rate(part: slice) -> Measured:
        return _rate(arrived[part], seconds[part], dispersion)

    def work(part: slice) -> Measured:
        return _rate(tokens[part], seconds[part], token_dispersion)

    variance = _variance(prompts.sum(axis=0))

    def mean_prompt(part: slice) -> Measured:
        return _mean_prompt(prompts[part].sum(axis=0), variance)

    # Requests from before a change, of their number or of their lengths, are of no use for either.
    first = max(widest_unchanged(starts, each, means_apart) for each in (rate, work, mean_prompt))
    window = slice(first, None)
    answers = answer_lengths(np.array([sample.answers for sample in samples]), starts)
    return Estimate(
        demand=Demand(
            rate_rps=rate(window).value,
            prompts=_prompts(_enough(samples, first)),
            output_tokens=answers.mean_tokens,
            kv_tokens=_kv_tokens(samples[answers.start :]),
            arrival_dispersion=min(max(dispersion, 1.0), _MAX_DISPERSION),
        ),
        rate_error=rate(window).error_share,
        prompt_error=work(window).error_share,
        answer_error=answers.error,
        window_s=float(seconds[window].sum()),
    )


def _starts(seconds: Floats) -> list[int]:
    """First sample of each candidate window; windows longer than the history are it, once."""
    back_s = np.cumsum(seconds[::-1])
    starts: list[int] = []
    for window_s in WINDOWS_S:
        num = int(np.searchsorted(back_s, window_s - 1e-6)) + 1
        start = max(len(seconds) - num, 0)
        if not starts or start < starts[-1]:
            starts.append(start)
    return starts


def _rate(counts: Floats, seconds: Floats, dispersion: float) -> Measured:
    """Per second. A time without any is not sure of it: one may just have been missed."""
    total, span_s = float(counts.sum()), float(seconds.sum())
    error = math.sqrt(dispersion * max(total, dispersion)) / span_s
    return Measured(value=total / span_s, standard_error=error)


def _mean_prompt(totals: Floats, variance: float) -> Measured:
    """Mean tokens of a prompt; a time in which none came agrees with everything.

    Args:
        totals: (2, classes) prompts that came, and their tokens.
        variance: of the lengths of all prompts: a few of them cannot tell how much lengths vary.
    """
    num = float(totals[0].sum())
    if not num:
        return Measured(value=0.0, standard_error=math.inf)
    mean = float(totals[1].sum()) / num
    return Measured(value=mean, standard_error=math.sqrt((variance + (_CLASS_SPREAD * mean) ** 2) / num))


def _variance(totals: Floats) -> float:
    """Of the prompts' lengths, by the means of their classes."""
    arrived, tokens = totals
    lengths = np.divide(tokens, arrived, out=np.zeros_like(tokens), where=arrived > 0)
    return float(arrived @ (lengths - tokens.sum() / arrived.sum()) ** 2 / arrived.sum())


def _dispersion(counts: Floats) -> float:
    """Variance over mean of the samples, by differences of neighbours, so that a trend does not add to it."""
    recent = counts[-DISPERSION_SAMPLES:]
    mean = float(recent.mean())
    if len(recent) < 3 or mean <= 0.0:
        return max(mean, 1.0)
    return max(float((np.diff(recent) ** 2).mean()) / (2.0 * mean), 1.0)


def _new_tokens(sample: TrafficSample) -> int:
    """Prompt tokens that came and that no cache held, as far as those placed tell."""
    _, prompt_tokens, placed, cached = sample.prompts.sum(axis=1).tolist()
    return int(prompt_tokens * (1.0 - cached / placed)) if placed else int(prompt_tokens)


def _enough(samples: Sequence[TrafficSample], first: int) -> Sequence[TrafficSample]:
    """The window, made longer until it holds some requests."""
    while first and sum(sample.num_arrived for sample in samples[first:]) < MIN_REQUESTS:
        first -= 1
    return samples[first:]


def _prompts(window: Sequence[TrafficSample]) -> tuple[PromptKind, ...]:
    arrived, prompt_tokens, placed, cached = np.sum([sample.prompts for sample in window], axis=0)
    all_cached = cached.sum() / placed.sum() if placed.sum() else 0.0
    kinds = []
    for index in np.flatnonzero(arrived):
        mean_tokens = prompt_tokens[index] / arrived[index]
        cached_share = cached[index] / placed[index] if placed[index] else all_cached
        kinds.append(
            PromptKind(
                new_tokens=float(max(mean_tokens * (1.0 - cached_share), 1.0)),
                cached_tokens=float(mean_tokens * cached_share),
                share=float(arrived[index] / arrived.sum()),
            )
        )
    return tuple(kinds)


def _kv_tokens(window: Sequence[TrafficSample]) -> float | None:
    num_tokens = sum(sample.output_tokens for sample in window)
    return sum(sample.kv_tokens for sample in window) / num_tokens if num_tokens else None
