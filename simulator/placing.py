"""One simulated request's place in the cluster: ``router/placing.py`` on the virtual clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from core.errors import NoWorkerAvailable, Rejected
from core.request import Path
from router.placement import Placement
from router.routing import Decision, RoutingRequest
from simulator.router import SimulatedRouter
from simulator.spec import ClusterSpec
from simulator.traces.trace import TraceRequest


class PlacedLap(Protocol):
    """Who is told what admission control has decided."""

    def sent(self, decision: Decision) -> None: ...

    def refused(self, error: NoWorkerAvailable | Rejected) -> None: ...


class Placing:
    """What a request is decided by, and who counts on it; an applicant of admission control."""

    __slots__ = (
        "_expected_at",
        "_lap",
        "_path",
        "_request",
        "_router",
        "_spec",
        "aimed_tpot_s",
        "arrival_s",
        "cached_tokens",
        "predicted_ttft_s",
        "priority",
        "prompt_tokens",
        "request_id",
        "tenant",
        "tpot_slo_s",
        "ttft_slo_s",
    )

    def __init__(
        self,
        lap: PlacedLap,
        router: SimulatedRouter,
        spec: ClusterSpec,
        index: int,
        request: TraceRequest,
        path: Path,
    ) -> None:
        self.request_id = str(index)
        self.tenant = request.tenant
        self.priority = request.priority
        self.arrival_s = request.arrival_s
        self.prompt_tokens = request.prompt_tokens
        self.ttft_slo_s = spec.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
        self.tpot_slo_s = spec.tpot_slo_s if request.tpot_slo_s is None else request.tpot_slo_s
        self.aimed_tpot_s = self.tpot_slo_s
        """As :class:`router.placing.Placing` has it."""
        self.cached_tokens: Mapping[str, int] = {}
        """By worker, as of the last decision."""
        self.predicted_ttft_s: float | None = None
        """With which admission control let it through; None if nobody knew, or without control."""
        self._lap = lap
        self._router = router
        self._spec = spec
        self._request = request
        self._path = path
        self._expected_at = ""
        """The worker that counts on decoding it while it is prefilled elsewhere."""

    def routing(self, now_s: float, tpot_factor: float = 1.0) -> RoutingRequest:
        """The request as the policy sees it now, its TPOT target divided by a factor."""
        self.cached_tokens = self._router.cached_tokens(self._request, self._spec.piece_tokens)
        return RoutingRequest(
            prompt_tokens=self.prompt_tokens,
            now_s=now_s,
            waited_s=now_s - self.arrival_s,
            cached_tokens=self.cached_tokens,
            ttft_slo_s=self.ttft_slo_s,
            tpot_slo_s=self.tpot_slo_s / tpot_factor,
        )

    def place(self, now_s: float) -> Placement:
        """See :meth:`router.applicant.Applicant.place`."""
        router, gate = self._router, self._router.gate
        assert gate is not None
        factor = gate.lateness.tpot_factor()
        self.aimed_tpot_s = self.tpot_slo_s / factor
        routing = self.routing(now_s, factor)
        if self._path is Path.PREFILL_ONLY:
            worker_id = router.choose_prefill_only(routing, ())
            decision = Decision(decode_worker="", prefill_worker=worker_id, reason="prefill_only")
        else:
            decision = router.choose(routing, ())
        return router.judge(decision, routing, gate, self._spec.tpot_slo_s / factor)

    def send(self, placement: Placement) -> None:
        """It goes where it was placed."""
        self.predicted_ttft_s = placement.ttft_s
        self._lap.sent(placement.decision)

    def refuse(self, error: NoWorkerAvailable | Rejected) -> None:
        """It does not go anywhere."""
        self._lap.refused(error)

    def expect_decode(self, now_s: float, decode_id: str, ttft_s: float | None) -> None:
        """A worker will decode it, once it is prefilled elsewhere: about ``ttft_s`` after its arrival."""
        self.expect_no_decode()
        self._expected_at = decode_id
        in_s = None if ttft_s is None else ttft_s - (now_s - self.arrival_s)
        self._router.decode_expected(decode_id, self.request_id, self.prompt_tokens, in_s)

    def expect_no_decode(self) -> None:
        """Its decode leg is being sent, or none will come."""
        if self._expected_at:
            self._router.decode_expected_no_more(self._expected_at, self.request_id)
            self._expected_at = ""
