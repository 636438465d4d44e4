"""The load of now, estimated from what routers have counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from core.traffic import ANSWER_CLASS_LIMITS
from planner.demand import Demand, PromptKind
from planner.level import Measured, widest_consistent
from planner.traffic_history import TrafficSample

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WINDOWS_S = (2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0)
"""Candidates, shortest first."""
MIN_REQUESTS = 8
"""Fewer in the whole history say nothing."""
DISPERSION_SAMPLES = 120
_MAX_DISPERSION = 100.0
_UNKNOWN_HAZARD = 0.5
"""Share of the answers in a class that no answer has reached yet that are taken to end in it."""
_CLASS_SPREAD = 0.1
"""Standard deviation of lengths inside a class, as a share of them."""
_PRIOR_ANSWERS = 4.0
"""What is known of older answers counts as this many in each class."""


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
    rates, steady = _windows(starts, lambda part: _rate(arrived[part], seconds[part], dispersion))
    work, steady_work = _windows(starts, lambda part: _rate(tokens[part], seconds[part], token_dispersion))
    prompts = np.array([sample.prompts[:2] for sample in samples], dtype=float)
    _, steady_prompts = _windows(starts, lambda part: _mean_prompt(prompts[part].sum(axis=0)))
    # Requests from before a change, of their number or of their lengths, are of no use for either.
    index = min(steady, steady_work, steady_prompts)
    first = starts[index]
    output_tokens, answer_error, answer_start = _answers(samples, starts)
    return Estimate(
        demand=Demand(
            rate_rps=rates[index].value,
            prompts=_prompts(_enough(samples, first)),
            output_tokens=output_tokens,
            kv_tokens=_kv_tokens(samples[answer_start:]),
            arrival_dispersion=min(max(dispersion, 1.0), _MAX_DISPERSION),
        ),
        rate_error=_share(rates[index]),
        prompt_error=_share(work[index]),
        answer_error=answer_error,
        window_s=float(seconds[first:].sum()),
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


def _windows(starts: Sequence[int], measure: Callable[[slice], Measured]) -> tuple[list[Measured], int]:
    """A figure over each window, and the index of the widest over which it has not changed."""
    windows = [measure(slice(start, None)) for start in starts]
    added = [measure(slice(start, newer)) for newer, start in pairwise(starts)]
    return windows, widest_consistent(windows, added)


def _rate(counts: Floats, seconds: Floats, dispersion: float) -> Measured:
    """Per second. A time without any is not sure of it: one may just have been missed."""
    total, span_s = float(counts.sum()), float(seconds.sum())
    error = math.sqrt(dispersion * max(total, dispersion)) / span_s
    return Measured(value=total / span_s, standard_error=error)


def _mean_prompt(totals: Floats) -> Measured:
    """Mean tokens of a prompt; a time in which none came agrees with everything.

    Args:
        totals: (2, classes) prompts that came, and their tokens.
    """
    arrived, tokens = totals
    num = float(arrived.sum())
    if not num:
        return Measured(value=0.0, standard_error=math.inf)
    mean = float(tokens.sum()) / num
    lengths = np.divide(tokens, arrived, out=np.zeros_like(tokens), where=arrived > 0)
    variance = float(arrived @ (lengths - mean) ** 2) / num + (_CLASS_SPREAD * mean) ** 2
    return Measured(value=mean, standard_error=math.sqrt(variance / num))


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


def _answers(samples: Sequence[TrafficSample], starts: Sequence[int]) -> tuple[float, float, int]:
    """Mean tokens of an answer, its standard error as a share, and the first sample that was used."""
    answers = np.array([sample.answers for sample in samples])
    everything = answers.sum(axis=0)
    if not everything[0].any():
        return 1.0, 1.0, 0
    prior = (everything[1] + _UNKNOWN_HAZARD) / (_left(everything) + 1.0)
    lengths = _class_lengths(everything)

    def measure(part: slice) -> Measured:
        totals = answers[part].sum(axis=0)
        return _mean_answer(_left(totals), totals[1], prior, lengths)

    windows, index = _windows(starts, measure)
    return windows[index].value, _share(windows[index]), starts[index]


def _left(answers: Ints) -> Ints:
    """Answers that left each class: those that ended in it and those that grew out of it."""
    left: Ints = answers[1] + np.append(answers[0][1:], 0)
    return left


def _mean_answer(left: Ints, ended: Ints, prior: Floats, lengths: Floats) -> Measured:
    """From how many of the answers that left a class ended in it: Kaplan and Meier's estimate."""
    hazard = (ended + _PRIOR_ANSWERS * prior) / (left + _PRIOR_ANSWERS)
    alive = np.concatenate(([1.0], np.cumprod(1.0 - hazard)))
    ends = alive[:-1] * hazard
    mean = float(ends @ lengths) + float(alive[-1] * lengths[-1])
    square = float(ends @ lengths**2) + float(alive[-1] * lengths[-1] ** 2)
    num = float(ended.sum()) + 1.0
    return Measured(value=mean, standard_error=math.sqrt(max(square - mean**2, 0.0) / num))


def _class_lengths(answers: Ints) -> Floats:
    """Mean tokens of the answers that ended in each class; the middle of those in which none did."""
    limits = np.array((*ANSWER_CLASS_LIMITS, 2 * ANSWER_CLASS_LIMITS[-1]), dtype=float)
    middles = 0.5 * (limits + np.concatenate(([0.0], limits[:-1])))
    lengths: Floats = np.divide(answers[2], answers[1], out=middles, where=answers[1] > 0)
    return lengths


def _share(measured: Measured) -> float:
    return measured.standard_error / measured.value if measured.value > 0 else 1.0
