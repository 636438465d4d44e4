"""What one simulated request's client has got, and what router, planner and recorder hear of it."""

from __future__ import annotations

from core.request import Path
from core.worker_events import Prefilled
from simulator.legs import DecodeLeg
from simulator.placing import Placing
from simulator.recorder import Recorder
from simulator.result import Outcome
from simulator.router import SimulatedRouter
from simulator.traces.trace import TraceRequest


class Answer:
    """Of a request, from its arrival to its end."""

    __slots__ = (
        "_index",
        "_num_tokens",
        "_placed",
        "_placing",
        "_recorder",
        "_request",
        "_router",
        "first_token_s",
        "leg",
    )

    def __init__(
        self,
        recorder: Recorder,
        router: SimulatedRouter,
        index: int,
        request: TraceRequest,
        placing: Placing,
    ) -> None:
        self._recorder = recorder
        self._router = router
        self._index = index
        self._request = request
        self._placing = placing
        self._placed = False
        self.first_token_s: float | None = None
        self._num_tokens = 0
        """Tokens given by legs that have ended..."""
        self.leg: DecodeLeg | None = None
        """...and the one that gives more."""

    @property
    def prompt_tokens(self) -> int:
        """Of its request."""
        return self._request.prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens given by legs that have ended."""
        return self._num_tokens

    def num_tokens_at(self, now_s: float) -> int:
        """Tokens that the client has got."""
        return self._num_tokens + (0 if self.leg is None else self.leg.num_tokens_at(now_s))

    def arrived(self) -> None:
        """The request reached its router."""
        self._router.num_ongoing += 1
        self._router.traffic.arrived(self)

    def placed(self, cached_tokens: int) -> None:
        """It was sent to a worker; the first one counts."""
        if not self._placed:
            self._placed = True
            self._router.traffic.counter.placed(self._request.prompt_tokens, cached_tokens)

    def prefilled(self, prefilled: Prefilled) -> None:
        self._recorder.prefilled(self._index, prefilled.num_cached_tokens, prefilled.queue_s)

    def first_token(self, now_s: float) -> None:
        self.first_token_s = now_s
        gate, predicted_ttft_s = self._router.gate, self._placing.predicted_ttft_s
        if gate is not None and predicted_ttft_s is not None:
            gate.lateness.answered(predicted_ttft_s, now_s - self._request.arrival_s)
        self._recorder.first_token(self._index, now_s)

    def leg_ended(self, num_tokens: int) -> None:
        """A leg gave this many tokens and will not give more."""
        self._num_tokens += num_tokens
        self.leg = None

    def finished(self, now_s: float, path: Path) -> None:
        """The client has all of it."""
        self._router.num_ongoing -= 1
        gate, num_tokens, placing = self._router.gate, self._request.output_tokens, self._placing
        assert self.first_token_s is not None
        tpot_s = (now_s - self.first_token_s) / (num_tokens - 1) if num_tokens > 1 else 0.0
        if gate is not None and num_tokens > 1:
            gate.lateness.finished(tpot_s, placing.aimed_tpot_s, num_tokens)
        self._router.traffic.ended(self, num_tokens)
        self._router.traffic.counter.finished(
            num_tokens,
            ttft_met=self.first_token_s - placing.arrival_s <= placing.ttft_slo_s,
            tpot_met=tpot_s <= placing.tpot_slo_s,
        )
        self._recorder.path(self._index, path)
        self._recorder.done(self._index, now_s)

    def refused(self, reason: str = "") -> None:
        """Turned away, by admission control if there is a reason; :meth:`given_up` follows."""
        if reason:
            self._recorder.refused(self._index, reason)
        self._router.traffic.counter.refused()

    def failed(self) -> None:
        """Nobody serves it, or goes on with it; :meth:`given_up` follows."""
        self._router.traffic.counter.failed()

    def given_up(self, now_s: float, path: Path) -> None:
        """The client gets no more of it."""
        self._router.num_ongoing -= 1
        self._router.traffic.ended(self, self._num_tokens)
        outcome = Outcome.FAILED if self._num_tokens else Outcome.REJECTED
        self._recorder.path(self._index, path if self._num_tokens else Path.NONE)
        self._recorder.not_done(self._index, now_s, outcome, self._num_tokens)
