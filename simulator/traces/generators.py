"""Generated loads: one specification and one seed give one trace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from core.errors import ConfigError
from simulator.traces.draws import Arrivals, Lengths, Poisson, check, checked_num
from simulator.traces.sessions import Sessions
from simulator.traces.trace import Trace, TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Independent:
    """Requests that have nothing to do with each other."""

    arrivals: Arrivals
    duration_s: float
    prompt: Lengths
    output: Lengths

    def __post_init__(self) -> None:
        check(0 < self.duration_s < math.inf, "duration", self.duration_s, "above 0 s")

    def draw(self, rng: np.random.Generator) -> list[TraceRequest]:
        """The requests, sorted by arrival."""
        times_s = self.arrivals.draw(rng, self.duration_s)
        prompts = self.prompt.draw(rng, len(times_s))
        outputs = self.output.draw(rng, len(times_s))
        return [
            TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
            for arrival_s, prompt, output in zip(
                times_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True
            )
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A time of one rate and one mix of lengths. A rate of 0 is a pause."""

    duration_s: float
    rate_rps: float
    prompt: Lengths
    output: Lengths

    def __post_init__(self) -> None:
        check(0 < self.duration_s < math.inf, "duration", self.duration_s, "above 0 s")
        check(0 <= self.rate_rps < math.inf, "rate", self.rate_rps, "at least 0 requests/s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Phases one after another, the whole row ``repeat`` times; Poisson arrivals in each.

    Two phases, repeated, make an on/off load.
    """

    phases: tuple[Phase, ...]
    repeat: int = 1

    def __post_init__(self) -> None:
        if not self.phases:
            raise ConfigError("a load of phases needs at least one phase")
        check(self.repeat >= 1, "repeat", self.repeat, "at least 1")

    def draw(self, rng: np.random.Generator) -> list[TraceRequest]:
        """The requests, sorted by arrival."""
        checked_num(self.repeat * sum(phase.rate_rps * phase.duration_s for phase in self.phases))
        requests: list[TraceRequest] = []
        start_s = 0.0
        for phase in self.phases * self.repeat:
            if phase.rate_rps:
                times_s = start_s + Poisson(rate_rps=phase.rate_rps).draw(rng, phase.duration_s)
                prompts = phase.prompt.draw(rng, len(times_s))
                outputs = phase.output.draw(rng, len(times_s))
                requests.extend(
                    TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
                    for arrival_s, prompt, output in zip(
                        times_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True
                    )
                )
            start_s += phase.duration_s
        return requests


WorkloadSpec = Independent | Phases | Sessions


def generate(spec: WorkloadSpec, seed: int, *, name: str | None = None) -> Trace:
    """Draws a trace. Its time 0 is the load's start, not the first arrival.

    Args:
        spec: the load.
        seed: of all draws.
        name: of the trace; None: the kind of load.

    Raises:
        core.errors.ConfigError: no request came, or far too many would.
    """
    requests = spec.draw(np.random.default_rng(seed))
    if not requests:
        raise ConfigError("no request arrived in the load's duration; raise the rate or the duration")
    kind = spec.arrivals if isinstance(spec, Independent) else spec
    return Trace(
        name=name or type(kind).__name__.lower(),
        requests=tuple(requests),
        hash_block_tokens=spec.hash_block_tokens if isinstance(spec, Sessions) else 512,
    )
