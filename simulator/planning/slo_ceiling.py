"""The attainment that no number of workers can pass: requests that miss the SLO even alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.performance_profile import PerformanceProfile
from core.table_step_time import TableStepTime
from simulator.planning.split_estimate import cached_tokens, prompt_s
from simulator.result import Slo
from simulator.traces.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Shares of all requests, 0 to 1. Causes are told apart in this order; each request counts once."""

    attainment: float
    """Share that would meet the SLO on an idle cluster that had cached every earlier prompt."""
    too_long: float
    """Prompt and answer do not fit into any worker's KV memory."""
    ttft_missed: float
    """The prompt alone takes longer than the TTFT target."""
    tpot_missed: float
    """A decode step for it alone takes longer than the TPOT target."""
    attainment_uncached: float
    """The same attainment if nothing were ever cached."""

    @property
    def reason(self) -> str:
        """What keeps it below 1, for people; empty if nothing does."""
        if self.attainment >= 1:
            return ""
        shares = (
            (self.ttft_missed, "prompt too long for TTFT"),
            (self.tpot_missed, "decode step too long for TPOT"),
            (self.too_long, "too long for a worker's KV memory"),
        )
        parts = ", ".join(f"{100 * share:.2f} % {cause}" for share, cause in shares if share)
        return (
            f"even an idle cluster misses: {100 * (1 - self.attainment):.2f} % of requests miss the SLO "
            f"alone ({parts})"
        )


def slo_ceiling(
    trace: Trace,
    slo: Slo,
    prefill_profiles: Sequence[PerformanceProfile],
    decode_profiles: Sequence[PerformanceProfile],
    *,
    overhead_s: float,
) -> Ceiling:
    """Looks at each request by itself, on the best profile for it; nothing is left out in its favour.

    Args:
        overhead_s: of router and network in a TTFT without queues.
    """
    cached = cached_tokens(trace, 1, float("inf"))
    prefills = [
        (TableStepTime(profile), profile.max_num_batched_tokens, _kv_room(profile))
        for profile in prefill_profiles
    ]
    decodes = [(TableStepTime(profile), _kv_room(profile)) for profile in decode_profiles]
    budget_s = slo.ttft_s - overhead_s
    num_too_long = num_ttft = num_tpot = num_uncached = 0
    for request, num_cached in zip(trace.requests, cached, strict=True):
        prompt, output = request.prompt_tokens, request.output_tokens
        fit_prefills = [(table, chunk) for table, chunk, room in prefills if prompt <= room]
        fit_decodes = [table for table, room in decodes if prompt + output - 1 <= room]
        if not fit_prefills or not fit_decodes:
            num_too_long += 1
        elif all(prompt_s(table, prompt, num_cached, chunk) > budget_s for table, chunk in fit_prefills):
            num_ttft += 1
        elif output > 1 and all(table.step_s((), 1, prompt) > slo.tpot_s for table in fit_decodes):
            num_tpot += 1
        elif num_cached and all(
            prompt_s(table, prompt, 0, chunk) > budget_s for table, chunk in fit_prefills
        ):
            num_uncached += 1
    num_requests = len(trace.requests)
    num_met = num_requests - num_too_long - num_ttft - num_tpot
    return Ceiling(
        attainment=num_met / num_requests,
        too_long=num_too_long / num_requests,
        ttft_missed=num_ttft / num_requests,
        tpot_missed=num_tpot / num_requests,
        attainment_uncached=(num_met - num_uncached) / num_requests,
    )


def _kv_room(profile: PerformanceProfile) -> int:
    return profile.worker_model_config().kv_capacity_tokens
