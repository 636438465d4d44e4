"""The rule by which requests meet or miss their SLO."""

from __future__ import annotations

import pytest

from telemetry.slo import Outcome, SloResult, SloTargets, judge, time_per_output_token_s

TARGETS = SloTargets(ttft_s=0.5, tpot_s=0.05)


@pytest.mark.parametrize(
    ("outcome", "ttft_s", "tpot_s", "e2e_s", "expected"),
    [
        (Outcome.OK, 0.5, 0.05, 1.0, SloResult.MET),
        (Outcome.OK, 0.6, 0.05, 1.0, SloResult.MISSED_TTFT),
        (Outcome.OK, 0.5, 0.06, 1.0, SloResult.MISSED_TPOT),
        (Outcome.OK, 0.6, 0.06, 1.0, SloResult.MISSED_TTFT),
        (Outcome.OK, 0.3, None, 0.3, SloResult.MET),
        (Outcome.OK, None, None, 0.4, SloResult.MET),
        (Outcome.OK, None, None, 0.6, SloResult.MISSED_TTFT),
        (Outcome.REJECTED, None, None, 0.0, SloResult.FAILED),
        (Outcome.FAILED, 0.1, 0.01, 1.0, SloResult.FAILED),
        (Outcome.CANCELLED, None, None, 0.4, None),
        (Outcome.CANCELLED, None, None, 0.6, SloResult.MISSED_TTFT),
        (Outcome.CANCELLED, 0.4, 0.01, 0.6, SloResult.MET),
        (Outcome.CANCELLED, 0.4, 0.06, 0.6, SloResult.MISSED_TPOT),
        (Outcome.INVALID, None, None, 9.0, None),
    ],
)
def test_a_request_is_judged(
    outcome: Outcome, ttft_s: float | None, tpot_s: float | None, e2e_s: float, expected: SloResult | None
) -> None:
    assert judge(TARGETS, outcome, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s) is expected


def test_tpot_is_the_mean_over_the_tokens_after_the_first() -> None:
    assert time_per_output_token_s(0.2, 1.2, 11) == pytest.approx(0.1)
    assert time_per_output_token_s(0.2, 0.2, 1) is None
    assert time_per_output_token_s(None, 0.2, 0) is None
