"""The stretch of a trace that asks for the most GPU time: a shorter thing to plan on than the whole."""

from __future__ import annotations

import math

from core.errors import ConfigError
from core.performance_profile import PerformanceProfile
from core.table_step_time import TableStepTime
from simulator.planning.split_estimate import prompt_s
from simulator.traces.trace import Trace

_MINUTE_S = 60.0
_TYPICAL_BATCH = 32


def busiest_window(
    trace: Trace, minutes: float, prefill: PerformanceProfile, decode: PerformanceProfile
) -> tuple[float, float]:
    """Start and end in seconds of the stretch whose requests take the most GPU time; the first of equals.

    A request's GPU time is its prompt's, uncached and alone, and its share of decode steps of
    32 like it.

    Raises:
        core.errors.ConfigError: ``minutes`` is not above 0.
    """
    if not 0 < minutes < math.inf:
        raise ConfigError(f"the busiest window must last more than 0 minutes, not {minutes:g}")
    length_s = minutes * _MINUTE_S
    table, decode_table = TableStepTime(prefill), TableStepTime(decode)
    requests = trace.requests
    work_s = [
        prompt_s(table, request.prompt_tokens, 0, prefill.max_num_batched_tokens)
        + request.output_tokens
        * decode_table.step_s((), _TYPICAL_BATCH, _TYPICAL_BATCH * request.prompt_tokens)
        / _TYPICAL_BATCH
        for request in requests
    ]
    best, best_work_s, sum_s, end = (0.0, length_s), -1.0, 0.0, 0
    for first, request in enumerate(requests):
        while end < len(requests) and requests[end].arrival_s < request.arrival_s + length_s:
            sum_s += work_s[end]
            end += 1
        if sum_s > best_work_s * (1 + 1e-9):
            best, best_work_s = (request.arrival_s, request.arrival_s + length_s), sum_s
        sum_s -= work_s[first]
    return best
