"""When a padded engine step ends: the arithmetic behind paced engines. No clock and no vLLM here.

Theory of operation. A paced engine computes each step as fast as it can and then sleeps until the step
has lasted::

    max(factor x CPU time of the step's own thread, min_step_ms, modelled time of the step)

so several engines share a few cores and none of them slows another, as long as the cores are idle for
most of the time. What is batched, cached, queued and moved stays real. A step that goes on with
sequences of the step before starts where that one was due to end: scheduling between two steps, and a
sleep that ended late, are then part of the padding and do not add up.

Three ways to set the pace:

* A factor alone follows the hardware, and with it the hardware's noise.
* Coefficients alone make steps of equal work equally long, whatever the processor does meanwhile. They
  have to leave room: a step that computes longer than it is modelled to last is late.
* Both: the coefficients set the pace and the factor bounds the load of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from core.performance_model import LinearStepTime, PrefillChunk

KEY_PREFIX = "baton_pace_"
_COEFFICIENTS = tuple(field.name for field in fields(LinearStepTime))
MAX_GAP_S = 0.05
"""Longest time between two steps that counts as part of the second one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one step computes, as ``core.performance_model.StepTime`` wants it."""

    prefills: tuple[PrefillChunk, ...] = ()
    num_decoding: int = 0
    decode_kv_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceConfig:
    """How long steps last at least."""

    factor: float = 0.0
    """Multiple of the CPU time that the step's thread spent; 0 leaves it out."""
    min_step_ms: float = 0.0
    step_time: LinearStepTime | None = None
    """Modelled time of a step; None leaves it out."""

    @staticmethod
    def from_options(options: Mapping[str, Any]) -> PaceConfig:
        """Reads the keys ``baton_pace_*`` of vLLM's ``additional_config``.

        They are ``baton_pace_factor``, ``baton_pace_min_step_ms`` and, each 0 unless given,
        ``baton_pace_`` before the name of each field of ``LinearStepTime``.

        Raises:
            ValueError: a key is unknown, a value makes no sense, or no pace is set at all.
        """
        given = {
            key.removeprefix(KEY_PREFIX): value
            for key, value in options.items()
            if key.startswith(KEY_PREFIX)
        }
        for name, value in given.items():
            if name not in ("factor", "min_step_ms", *_COEFFICIENTS):
                known = ", ".join(("factor", "min_step_ms", *_COEFFICIENTS))
                raise ValueError(
                    f"additional_config: no key {KEY_PREFIX}{name}; after the prefix may stand {known}"
                )
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(
                    f"additional_config.{KEY_PREFIX}{name} must be a number of 0 or more, not {value!r}"
                )
        factor = float(given.pop("factor", 0.0))
        min_step_ms = float(given.pop("min_step_ms", 0.0))
        if 0 < factor < 1:
            raise ValueError(
                f"additional_config.{KEY_PREFIX}factor must be 1 or more, or 0 for none, not {factor}"
            )
        if not any((factor, min_step_ms, *given.values())):
            raise ValueError(
                f"additional_config sets no pace: give {KEY_PREFIX}factor, {KEY_PREFIX}min_step_ms or "
                f"coefficients such as {KEY_PREFIX}decode_base_ms"
            )
        step_time = LinearStepTime(**{name: float(given.get(name, 0.0)) for name in _COEFFICIENTS})
        return PaceConfig(
            factor=factor, min_step_ms=min_step_ms, step_time=step_time if any(given.values()) else None
        )

    def step_s(self, work: StepWork, cpu_s: float) -> float:
        """Seconds a step lasts that took its thread ``cpu_s`` of CPU time."""
        modelled_s = 0.0
        if self.step_time is not None:
            modelled_s = self.step_time.step_s(work.prefills, work.num_decoding, work.decode_kv_tokens)
        return max(self.factor * cpu_s, self.min_step_ms / 1e3, modelled_s)


class Pacer:
    """Ends of consecutive steps. All times are seconds of one clock, given by the caller."""

    def __init__(self, config: PaceConfig) -> None:
        self.config = config
        self.num_steps = 0
        self.num_late = 0
        """Steps that had lasted too long already when they were computed."""
        self._start_s = 0.0
        self._last_end_s = -math.inf

    def begin(self, now_s: float, *, goes_on: bool) -> None:
        """A step starts.

        Args:
            goes_on: it computes sequences that the step before computed too, so the engine was not
                idle between them.
        """
        gap_s = now_s - self._last_end_s
        self._start_s = self._last_end_s if goes_on and 0 <= gap_s <= MAX_GAP_S else now_s

    def end(self, now_s: float, work: StepWork, cpu_s: float) -> float:
        """The step is computed; returns how long to sleep, in seconds."""
        end_s = self._start_s + self.config.step_s(work, cpu_s)
        self.num_steps += 1
        self.num_late += now_s > end_s
        self._last_end_s = max(now_s, end_s)
        return max(0.0, end_s - now_s)
