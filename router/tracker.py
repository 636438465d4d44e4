"""Follows requests from arrival to end: traces, metrics, and the traffic that the planner hears of."""

from __future__ import annotations

from core.clock import Clock
from core.request import Path
from engine.base import EngineDelta
from router.trace import RESTARTED, RESUMED, RequestTrace, TraceLog
from router.traffic_counter import TrafficCounter
from telemetry.router_metrics import RequestMetrics, RouterMetrics
from telemetry.slo import Outcome, SloResult

_OUTCOMES = {
    "completed": Outcome.OK,
    "cancelled": Outcome.CANCELLED,
    "rejected": Outcome.REJECTED,
    "failed": Outcome.FAILED,
    "invalid": Outcome.INVALID,
}


class RequestTracker:
    """One per router replica."""

    def __init__(
        self, metrics: RouterMetrics, traces: TraceLog, clock: Clock, traffic: TrafficCounter
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self.traces = traces
        self.traffic = traffic
        self.num_ongoing = 0
        """Sequences that have begun and not ended."""

    def refused(self, reason: str) -> None:
        """Admission control has turned a request away."""
        self._metrics.rejected.labels(reason).inc()

    def begin(self, trace: RequestTrace) -> TrackedRequest:
        self.traffic.arrived(trace.prompt_tokens)
        self.num_ongoing += 1
        request_metrics = self._metrics.for_request(trace.model, trace.adapter, trace.tenant)
        return TrackedRequest(trace, self, request_metrics, self._clock)


class TrackedRequest:
    """One sequence; its methods are on the per-token path."""

    __slots__ = ("_clock", "_ended", "_metrics", "_tracker", "stopped", "trace")

    def __init__(
        self, trace: RequestTrace, tracker: RequestTracker, metrics: RequestMetrics, clock: Clock
    ) -> None:
        self.trace = trace
        self.stopped = False
        """The router has the whole text: what the engine still does is waste."""
        self._ended = False
        self._tracker = tracker
        self._clock = clock
        self._metrics = metrics
        self._metrics.arrived()

    def on_delta(self, delta: EngineDelta) -> None:
        num_tokens = len(delta.token_ids)
        if not num_tokens:
            return
        trace, now_s = self.trace, self._clock.now_s()
        if trace.first_token_at_s is None:
            trace.first_token_at_s = now_s
            self._metrics.first_token(now_s - trace.received_at_s, num_tokens)
        else:
            self._metrics.next_tokens(now_s - (trace.last_token_at_s or now_s), num_tokens)
        trace.last_token_at_s = now_s
        self._tracker.traffic.tokens(trace.prompt_tokens, trace.output_tokens, num_tokens)
        trace.output_tokens += num_tokens

    def end(self, outcome: str) -> None:
        """The sequence is over; only the first call counts.

        Args:
            outcome: ``completed``, ``cancelled``, ``rejected``, ``failed`` or ``invalid``.
        """
        if self._ended:
            return
        self._ended = True
        trace, metrics = self.trace, self._metrics
        trace.outcome = outcome
        end_s = trace.last_token_at_s or self._clock.now_s()
        placed = trace.prefill_worker or trace.decode_worker
        result = metrics.finished(
            trace.path if placed else Path.NONE,
            _OUTCOMES[outcome],
            e2e_s=end_s - trace.received_at_s,
            ttft_s=trace.ttft_s,
            num_output_tokens=trace.output_tokens,
            own_targets=trace.slo,
        )
        if trace.output_tokens:
            metrics.prompt(trace.prompt_tokens, trace.cached_tokens)
        for leg, seconds in trace.legs_s().items():
            metrics.leg(leg, seconds)
        for reason in trace.fallbacks:
            if reason == RESTARTED:
                metrics.retried("restarted")
            elif reason != RESUMED:
                metrics.prefill_fell_back(reason)
        for resumption in trace.resumptions:
            metrics.retried("replayed" if resumption.replayed else "continued", resumption.pause_s)
        if trace.kv_outcome == "recomputed":
            metrics.kv_recomputed(trace.kv_reason)
        if trace.kv_bytes:
            metrics.kv_transferred(trace.kv_bytes)
        self._tracker.num_ongoing -= 1
        self._count(_OUTCOMES[outcome], result)
        self._tracker.traces.add(trace)

    def _count(self, outcome: Outcome, result: SloResult | None) -> None:
        traffic = self._tracker.traffic
        if outcome is Outcome.REJECTED:
            traffic.refused()
        elif outcome is Outcome.FAILED:
            traffic.failed()
        elif outcome is Outcome.OK:
            traffic.finished(
                self.trace.output_tokens,
                ttft_met=result is not SloResult.MISSED_TTFT,
                tpot_met=result is not SloResult.MISSED_TPOT,
            )
