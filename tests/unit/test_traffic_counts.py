"""What a router counts for the planner, from arrival to end."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from core.clock import ManualClock
from core.request import Path
from core.traffic import TrafficSummary, answer_class, prompt_class
from engine.base import EngineDelta
from router.trace import RequestTrace, TraceLog
from router.tracker import RequestTracker, TrackedRequest
from router.traffic_counter import TrafficCounter
from telemetry.router_metrics import RouterMetrics
from telemetry.slo import SloTargets

MODEL_SLO = SloTargets(ttft_s=1.0, tpot_s=0.1)


class Router:
    """A tracker and its clock."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.traffic = TrafficCounter("r")
        metrics = RouterMetrics(CollectorRegistry(), slo_targets={"m": MODEL_SLO})
        self.tracker = RequestTracker(metrics, TraceLog(), self.clock, self.traffic)

    def begin(self, prompt_tokens: int = 100, slo: SloTargets = MODEL_SLO) -> TrackedRequest:
        trace = RequestTrace(
            request_id="q",
            model="m",
            adapter="",
            tenant="",
            prompt_tokens=prompt_tokens,
            received_at_s=self.clock.now_s(),
            path=Path.REMOTE,
            slo=slo,
        )
        return self.tracker.begin(trace)

    def answer(self, request: TrackedRequest, *gaps_s: float) -> None:
        """One token after each gap."""
        for gap_s in gaps_s:
            self.clock.advance(gap_s)
            request.on_delta(EngineDelta(token_ids=[1]))

    @property
    def summary(self) -> TrafficSummary:
        return self.traffic.summary(
            num_waiting=0, waiting_prompt_tokens=0, num_ongoing=self.tracker.num_ongoing
        )


@pytest.fixture
def router() -> Router:
    return Router()


def test_a_request_counts_in_the_class_of_its_prompt_when_it_comes(router: Router) -> None:
    router.begin(prompt_tokens=1000)
    router.begin(prompt_tokens=1010)
    summary = router.summary
    assert summary.num_arrived[prompt_class(1000)] == sum(summary.num_arrived) == 2
    assert sum(summary.prompt_tokens) == 2010
    assert summary.num_ongoing == 2


def test_an_answer_counts_as_it_grows_and_when_it_ends(router: Router) -> None:
    request = router.begin()
    router.answer(request, 0.5, *[0.05] * 9)
    assert router.summary.output_tokens == 10
    assert router.summary.num_reached[answer_class(10)] == 1
    assert sum(router.summary.num_ended) == 0
    request.end("completed")
    summary = router.summary
    assert summary.num_ended[answer_class(10)] == sum(summary.num_ended) == 1
    assert sum(summary.ended_tokens) == 10
    assert (summary.num_met, summary.num_ongoing) == (1, 0)


@pytest.mark.parametrize(
    ("gaps_s", "result"),
    [
        ((0.9, 0.09), (1, 0, 0)),
        ((1.1, 0.01), (0, 1, 0)),
        ((0.5, 0.2), (0, 0, 1)),
        ((1.1, 0.2), (0, 1, 0)),
    ],
)
def test_it_is_judged_by_both_targets(
    router: Router, gaps_s: tuple[float, ...], result: tuple[int, int, int]
) -> None:
    request = router.begin()
    router.answer(request, *gaps_s)
    request.end("completed")
    summary = router.summary
    assert (summary.num_met, summary.num_missed_ttft, summary.num_missed_tpot) == result


def test_a_requests_own_targets_count_in_place_of_the_models(router: Router) -> None:
    strict, lax = SloTargets(ttft_s=0.1, tpot_s=0.1), SloTargets(ttft_s=9.0, tpot_s=9.0)
    for slo in (strict, lax):
        request = router.begin(slo=slo)
        router.answer(request, 2.0, 2.0)
        request.end("completed")
    assert (router.summary.num_met, router.summary.num_missed_ttft) == (1, 1)


@pytest.mark.parametrize(
    ("outcome", "refused", "failed"),
    [("rejected", 1, 0), ("failed", 0, 1), ("cancelled", 0, 0), ("invalid", 0, 0)],
)
def test_what_gets_no_answer_is_counted_by_its_end_and_only_once(
    router: Router, outcome: str, refused: int, failed: int
) -> None:
    request = router.begin()
    request.end(outcome)
    request.end(outcome)
    summary = router.summary
    assert (summary.num_refused, summary.num_failed) == (refused, failed)
    assert sum(summary.num_ended) == summary.num_met == summary.num_ongoing == 0
