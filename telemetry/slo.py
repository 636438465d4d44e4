"""SLO targets and the one rule by which a request meets or misses them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How a request ended, as its client saw it."""

    OK = "ok"
    """A whole answer."""
    CANCELLED = "cancelled"
    """The client went away first."""
    REJECTED = "rejected"
    """429 or 503 before any work was done."""
    FAILED = "failed"
    """An error that was not the client's."""
    INVALID = "invalid"
    """A 4xx that was the client's: not offered load, so it counts neither for nor against the SLO."""


class SloResult(StrEnum):
    """What a request adds to attainment; a request that misses both targets is ``missed_ttft``."""

    MET = "met"
    MISSED_TTFT = "missed_ttft"
    MISSED_TPOT = "missed_tpot"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SloTargets:
    """A model's targets."""

    ttft_s: float
    tpot_s: float


def time_per_output_token_s(ttft_s: float | None, e2e_s: float, num_tokens: float) -> float | None:
    """Mean seconds per output token after the first, or None if there was no second token.

    Args:
        ttft_s: arrival to first token; None if there was none.
        e2e_s: arrival to last token.
        num_tokens: output tokens of one choice.
    """
    if ttft_s is None or num_tokens <= 1:
        return None
    return (e2e_s - ttft_s) / (num_tokens - 1)


def judge(
    targets: SloTargets, outcome: Outcome, *, ttft_s: float | None, tpot_s: float | None, e2e_s: float
) -> SloResult | None:
    """Whether a request met its SLO; None if it does not count.

    A client that goes away is judged by what it had received: one that waited in vain for its first
    token longer than the TTFT target is a miss, one that left sooner says nothing about the service.
    """
    if outcome is Outcome.INVALID:
        return None
    if outcome in (Outcome.REJECTED, Outcome.FAILED):
        return SloResult.FAILED
    if ttft_s is None and outcome is Outcome.CANCELLED and e2e_s <= targets.ttft_s:
        return None
    # A whole answer without a token (a prompt that stops at once) took e2e_s to arrive.
    if (e2e_s if ttft_s is None else ttft_s) > targets.ttft_s:
        return SloResult.MISSED_TTFT
    if tpot_s is not None and tpot_s > targets.tpot_s:
        return SloResult.MISSED_TPOT
    return SloResult.MET
