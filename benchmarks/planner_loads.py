"""The planner benchmark's loads: drawn from seeds, by rules that know nothing of any planner.

Two kinds of requests make the generated loads: with long prompts and short answers, and the other way round.
``capacity`` is what some static split takes of one kind, see :mod:`benchmarks.planner_capacity`. A mix's is
the harmonic mean by shares, as if GPUs could be divided at will.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from benchmarks.routing_runs import FIRST_REQUEST, TRACE_FILES, traces_folder
from simulator.traces.draws import FixedLengths, Lengths, LognormalLengths, Poisson
from simulator.traces.edits import scale_rate
from simulator.traces.generators import Independent, Phase, Phases, generate
from simulator.traces.readers import read_trace
from simulator.traces.trace import Trace, TraceRequest

PHASE_SHIFT, BURSTY, DIURNAL = "phase shift", "bursty", "diurnal"
SERVEGEN = "ServeGen m-large"
TRACES = (*TRACE_FILES, SERVEGEN)
LOADS = (PHASE_SHIFT, BURSTY, DIURNAL, *TRACES)
SERVEGEN_FILE = "servegen_m_large_10min.csv"

SIGMA = 0.4
"""Of all lognormal lengths."""
PHASE_S = 60.0
SHIFT_LOAD = 0.82
"""Share of its own best split's capacity at which each phase runs."""
TRACE_LOAD = 0.8
QUIET_S, BURST_S = 45.0, 15.0
"""Mean times of each kind's quiet and burst state, exponential."""
BURST_FACTOR = 4.0
BURSTY_LOAD = 0.55
DIURNAL_LOADS = (0.25, 0.82)
DIURNAL_SHARES = (0.1, 0.9)
"""Of the work, the part of requests with long prompts; a quarter of a day behind the rate."""
RECORDED_S = 600.0
"""Of a whole recorded trace, or a day of ServeGen's."""
JITTER_S = 10.0
DAY_S = 86_400.0
_STEP_S = 1.0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """One kind of requests; lengths are lognormal."""

    prompt_tokens: float
    output_tokens: float

    @property
    def prompt(self) -> Lengths:
        return LognormalLengths(mean=self.prompt_tokens, sigma=SIGMA)

    @property
    def output(self) -> Lengths:
        return LognormalLengths(mean=self.output_tokens, sigma=SIGMA)


LONG_PROMPTS = Mix(prompt_tokens=6000, output_tokens=100)
LONG_ANSWERS = Mix(prompt_tokens=500, output_tokens=700)
MIDDLE = Mix(prompt_tokens=2000, output_tokens=300)
"""What the stability runs use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacities:
    """Requests per second of each kind alone."""

    long_prompts_rps: float
    long_answers_rps: float


def phase_shift(capacities: Capacities, duration_s: float, seed: int) -> Trace:
    """Phases of the two kinds in turn, each at the same share of what its best split takes."""
    kinds = ((LONG_PROMPTS, capacities.long_prompts_rps), (LONG_ANSWERS, capacities.long_answers_rps))
    phases = []
    for number in range(math.ceil(duration_s / PHASE_S)):
        mix, capacity_rps = kinds[number % 2]
        phases.append(
            Phase(
                duration_s=min(PHASE_S, duration_s - number * PHASE_S),
                rate_rps=SHIFT_LOAD * capacity_rps,
                prompt=mix.prompt,
                output=mix.output,
            )
        )
    return generate(Phases(phases=tuple(phases)), seed, name=PHASE_SHIFT)


def bursty(capacities: Capacities, duration_s: float, seed: int) -> Trace:
    """Each kind by itself is quiet or bursts (MMPP); together ``BURSTY_LOAD`` on average, half each."""
    quiet = BURSTY_LOAD / 2 * (QUIET_S + BURST_S) / (QUIET_S + BURST_FACTOR * BURST_S)
    rng = np.random.default_rng(seed)

    def states() -> Floats:
        loads = np.empty(math.ceil(duration_s / _STEP_S))
        step, bursts = 0, bool(rng.random() < BURST_S / (QUIET_S + BURST_S))
        while step < len(loads):
            num = max(1, round(rng.exponential(BURST_S if bursts else QUIET_S) / _STEP_S))
            loads[step : step + num] = quiet * (BURST_FACTOR if bursts else 1.0)
            step, bursts = step + num, not bursts
        return loads

    return _two_kinds(BURSTY, capacities, states(), states(), rng)


def diurnal(capacities: Capacities, duration_s: float, seed: int) -> Trace:
    """A day in ``duration_s``: rate and mix each follow a sinusoid, a quarter of a day apart."""
    phase = 2 * math.pi * np.arange(math.ceil(duration_s / _STEP_S)) * _STEP_S / duration_s
    low, high = DIURNAL_LOADS
    load = low + (high - low) * (1 - np.cos(phase)) / 2
    least, most = DIURNAL_SHARES
    share = least + (most - least) * (1 - np.sin(phase)) / 2
    return _two_kinds(DIURNAL, capacities, load * share, load * (1 - share), np.random.default_rng(seed))


def stationary(mix: Mix, rate_rps: float, duration_s: float, seed: int) -> Trace:
    """Poisson arrivals of one kind."""
    load = Independent(
        arrivals=Poisson(rate_rps=rate_rps), duration_s=duration_s, prompt=mix.prompt, output=mix.output
    )
    return generate(load, seed, name="Poisson")


def constant(mix: Mix, rate_rps: float, duration_s: float) -> Trace:
    """Evenly spaced requests, all alike."""
    prompt, output = (
        FixedLengths(tokens=round(tokens)).tokens for tokens in (mix.prompt_tokens, mix.output_tokens)
    )
    requests = (
        TraceRequest(arrival_s=number / rate_rps, prompt_tokens=prompt, output_tokens=output)
        for number in range(int(rate_rps * duration_s))
    )
    return Trace(name="constant", requests=tuple(requests))


def recorded(name: str, rate_rps: float, duration_s: float, seed: int) -> Trace:
    """The beginning of a recorded trace that, compressed, would take ``RECORDED_S`` as a whole.

    Of ServeGen's, the whole is its first day. Where time alone does not bring a trace to the mean rate asked
    for, copies lie on top of each other, each moved by up to ``JITTER_S`` and with prompts of its own. Where
    it would be too fast, it is a part of the trace, and slower.
    """
    num_requests = round(rate_rps * duration_s)
    if name == SERVEGEN:
        return _servegen(num_requests, duration_s, seed)
    whole = _whole(name)
    factor = RECORDED_S / whole.duration_s
    beginning = [request for request in whole.requests if request.arrival_s * factor < duration_s]
    copies = num_requests / len(beginning)
    if copies <= 1:
        first = min(FIRST_REQUEST[name], len(whole.requests) - num_requests)
        requests = whole.requests[first : first + num_requests]
        start_s = requests[0].arrival_s
        part = replace(whole, requests=tuple(replace(r, arrival_s=r.arrival_s - start_s) for r in requests))
        return scale_rate(part, part.duration_s / duration_s)
    rng = np.random.default_rng(seed)
    names = 1 + max(block for request in whole.requests for block in (*request.block_hashes, 0))
    copied: list[TraceRequest] = []
    for number in range(math.ceil(copies)):
        moved_s = float(rng.uniform(0, JITTER_S))
        keep = rng.random(len(beginning)) < copies - number
        for request, kept in zip(beginning, keep.tolist(), strict=True):
            arrival_s = (request.arrival_s * factor + moved_s) % duration_s
            if kept:
                hashes = tuple(block + number * names for block in request.block_hashes)
                copied.append(replace(request, arrival_s=arrival_s, block_hashes=hashes))
    copied.sort(key=lambda request: request.arrival_s)
    return replace(whole, requests=tuple(copied))


def _servegen(num_requests: int, duration_s: float, seed: int) -> Trace:
    path = traces_folder() / SERVEGEN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: docs/benchmarks.md says where it is published")
    num_drawn, share = 0, 1e-3
    while abs(num_drawn / num_requests - 1) > 0.02:  # the file does not say how many requests a day has
        share *= num_requests / num_drawn if num_drawn else 1.0
        part_s = DAY_S * min(1.0, duration_s / RECORDED_S)
        trace = read_trace(path, seed=seed, duration_s=part_s, keep_share=share, max_drawn_requests=10**6)
        num_drawn = len(trace.requests)
    return replace(scale_rate(trace, trace.duration_s / duration_s), name=SERVEGEN)


@cache
def _whole(name: str) -> Trace:
    return replace(read_trace(traces_folder() / TRACE_FILES[name]), name=name)


def _two_kinds(
    name: str, capacities: Capacities, long_prompts: Floats, long_answers: Floats, rng: np.random.Generator
) -> Trace:
    """Poisson arrivals of both kinds; loads as shares of the kind's capacity, one a step."""
    requests: list[TraceRequest] = []
    for mix, capacity_rps, loads in (
        (LONG_PROMPTS, capacities.long_prompts_rps, long_prompts),
        (LONG_ANSWERS, capacities.long_answers_rps, long_answers),
    ):
        counts = rng.poisson(loads * capacity_rps * _STEP_S)
        times_s = (np.repeat(np.arange(len(counts)), counts) + rng.random(counts.sum())) * _STEP_S
        prompts, outputs = mix.prompt.draw(rng, len(times_s)), mix.output.draw(rng, len(times_s))
        requests.extend(
            TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
            for arrival_s, prompt, output in zip(
                times_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True
            )
        )
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(name=name, requests=tuple(requests))


GENERATED: dict[str, Callable[[Capacities, float, int], Trace]] = {
    PHASE_SHIFT: phase_shift,
    BURSTY: bursty,
    DIURNAL: diurnal,
}
