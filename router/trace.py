"""What happened to one request, moment by moment."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

from core.request import Leg, Path
from router.routing import Decision
from telemetry.slo import SloTargets

RESTARTED = "decode_retry"
RESUMED = "resumed"
"""Fallbacks of a request that lost its worker: before it had a token, and after."""


@dataclass(slots=True, kw_only=True)
class Resumption:
    """An answer that had begun lost its worker and was taken up by another one."""

    lost_worker: str
    num_tokens: int
    """Sent until then."""
    replayed: bool
    """The other worker went through those tokens one by one, for a seed, a grammar or the like."""
    lost_at_s: float
    resumed_at_s: float | None = None
    """When the next token was here; None if it never came."""

    @property
    def pause_s(self) -> float | None:
        """What the client saw of it."""
        return None if self.resumed_at_s is None else self.resumed_at_s - self.lost_at_s


@dataclass(slots=True, kw_only=True)
class RequestTrace:
    """Filled in by the relay while the request runs; times are seconds on the router's clock."""

    request_id: str
    model: str
    adapter: str
    tenant: str
    prompt_tokens: int
    received_at_s: float
    path: Path
    """The way it went; until a worker has it, the way it is meant to go."""
    prefill_worker: str = ""
    decode_worker: str = ""
    prefill_sent_at_s: float | None = None
    prefill_done_at_s: float | None = None
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    first_token_at_s: float | None = None
    handoff_sent_at_s: float | None = None
    first_decode_at_s: float | None = None
    decode_queue_s: float = 0.0
    last_token_at_s: float | None = None
    output_tokens: int = 0
    cached_tokens: int = 0
    kv_bytes: int = 0
    kv_pull_s: float = 0.0
    kv_outcome: str = ""
    kv_reason: str = ""
    slo: SloTargets | None = None
    """The request's own targets, None for its model's."""
    decisions: list[Decision] = field(default_factory=list)
    """The routing policy's, one after another."""
    explanations: list[dict[str, Any]] = field(default_factory=list)
    """What each of them was made from, if the client asked for it (:mod:`router.explain`)."""
    fallbacks: tuple[str, ...] = ()
    resumptions: list[Resumption] = field(default_factory=list)
    outcome: str = "running"

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at_s is None else self.first_token_at_s - self.received_at_s

    @property
    def tpot_s(self) -> float | None:
        """None with fewer than two tokens."""
        if self.first_token_at_s is None or self.last_token_at_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_at_s - self.first_token_at_s) / (self.output_tokens - 1)

    def of_rest(self, now_s: float, path: Path) -> RequestTrace:
        """For the rest of an answer, whose legs are not this request's waterfall; decisions are shared."""
        return RequestTrace(
            request_id=self.request_id,
            model=self.model,
            adapter=self.adapter,
            tenant=self.tenant,
            prompt_tokens=self.prompt_tokens,
            received_at_s=now_s,
            path=path,
            slo=self.slo,
            decisions=self.decisions,
            explanations=self.explanations,
        )

    def take_rest(self, rest: RequestTrace) -> None:
        """What became of the answer's rest belongs to the request, but for its legs."""
        self.fallbacks = (*self.fallbacks, *rest.fallbacks)
        self.prefill_worker = rest.prefill_worker or self.prefill_worker
        self.decode_worker = rest.decode_worker or rest.prefill_worker
        self.kv_outcome, self.kv_reason = rest.kv_outcome or self.kv_outcome, rest.kv_reason or self.kv_reason
        self.kv_bytes += rest.kv_bytes

    def begin_again(self) -> None:
        """It starts from nothing: the legs so far were for nothing."""
        self.prefill_sent_at_s = self.prefill_done_at_s = None
        self.handoff_sent_at_s = self.first_decode_at_s = None
        self.prefill_queue_s = self.prefill_s = self.decode_queue_s = 0.0

    def legs_s(self) -> dict[Leg, float]:
        """The waterfall: seconds spent in each leg the request went through."""
        legs: dict[Leg, float] = {}
        left_router_at_s = self.prefill_sent_at_s or self.handoff_sent_at_s
        if left_router_at_s is not None:
            legs[Leg.ROUTER_QUEUE] = left_router_at_s - self.received_at_s
        if self.prefill_done_at_s is not None:
            legs[Leg.PREFILL_QUEUE] = self.prefill_queue_s
            legs[Leg.PREFILL] = self.prefill_s
        if self.handoff_sent_at_s is None or self.first_decode_at_s is None:
            return legs
        if self.prefill_done_at_s is not None:
            legs[Leg.HANDOFF] = self.handoff_sent_at_s - self.prefill_done_at_s
        waited_s = self.first_decode_at_s - self.handoff_sent_at_s
        # The engine counts the pull as queueing.
        legs[Leg.TRANSFER] = min(self.kv_pull_s, waited_s)
        legs[Leg.DECODE_QUEUE] = max(min(self.decode_queue_s, waited_s) - legs[Leg.TRANSFER], 0.0)
        legs[Leg.FIRST_DECODE_STEP] = waited_s - legs[Leg.TRANSFER] - legs[Leg.DECODE_QUEUE]
        if self.last_token_at_s is not None:
            legs[Leg.DECODE] = self.last_token_at_s - self.first_decode_at_s
        return legs

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every field, the waterfall, TTFT and TPOT."""
        return {**asdict(self), "ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "legs_s": self.legs_s()}


class TraceLog:
    """The latest finished traces of this router, by the id the client saw."""

    def __init__(self, capacity: int = 1000) -> None:
        self._traces: OrderedDict[str, RequestTrace] = OrderedDict()
        self._capacity = capacity

    def add(self, trace: RequestTrace) -> None:
        self._traces[trace.request_id] = trace
        while len(self._traces) > self._capacity:
            self._traces.popitem(last=False)

    def get(self, request_id: str) -> RequestTrace | None:
        """By the id in the response; vLLM numbers the prompts of a completion and the turns of a response."""
        numbered = (f"{request_id}{suffix}" for suffix in ("", "-0", "_0"))
        return next((self._traces[name] for name in numbered if name in self._traces), None)
