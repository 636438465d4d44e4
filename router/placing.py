"""One request's place in the cluster: where it goes, and what it counts for there before it arrives."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from core.clock import Clock
from core.request import Path
from core.types import Role
from router.admission_limits import AdmissionLimits
from router.cluster_view import ClusterView, Member
from router.explain import explain
from router.placement import Placement, judge
from router.relay_request import RelayRequest
from router.routing import Candidate, Decision, RoutingPolicy, RoutingRequest
from router.trace import RequestTrace
from router.traffic_counter import TrafficCounter
from telemetry.logs import fields

logger = logging.getLogger(__name__)

LAST_RESORT = "last_resort"
"""Reason of a decision when no worker of the right role was left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacingContext:
    """What all requests of a router are placed with."""

    view: ClusterView
    policy: RoutingPolicy
    clock: Clock
    limits: AdmissionLimits
    tpot_slo_s: float
    """The model's, for the requests that run already."""
    tpot_factor: Callable[[], float]
    """By how much TPOT targets are tightened, because answers have missed them."""
    traffic: TrafficCounter
    """Told of each request when it is first sent."""


class Placing:
    """Decides for one request, and books each decision on the views of its workers at once.

    Whoever is decided for next, on this router, sees what this request will cost. It is an applicant of
    :class:`router.admission.AdmissionController`.
    """

    def __init__(
        self,
        request: RelayRequest,
        trace: RequestTrace,
        context: PlacingContext,
        *,
        revision: str | None = None,
    ) -> None:
        self.request_id = request.request_id
        self.tenant = request.owner
        self.priority = request.priority
        self.arrival_s = trace.received_at_s
        self.ttft_slo_s = request.ttft_slo_s
        self.prompt_tokens = len(request.prompt_token_ids)
        self.sent: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        """The first decision, once there is room for the request."""
        self.predicted_ttft_s: float | None = None
        """When the first token was expected, from arrival, as the request was sent; None if nobody knew."""
        self.aimed_tpot_s = request.tpot_slo_s
        """Its target as it was placed: less than promised where answers have come too slowly."""
        self._request = request
        self._trace = trace
        self._context = context
        self._bound_to = self._revision = revision
        self._blocks = request.blocks() if context.policy.uses_caches else None
        self._cached_tokens: dict[str, int] = {}
        """By worker, as of the last decision."""
        self._prefilling_at: Member | None = None
        self._expected_at: Member | None = None
        self._local_at: Member | None = None
        self._num_prefills = 0
        self._explained: dict[str, Any] | None = None

    @property
    def revision(self) -> str | None:
        """Weights of the workers of the last decision; None before there was one."""
        return self._revision

    @property
    def prefill_id(self) -> str:
        """Of the prefill leg that was decided for last."""
        return f"{self.request_id}.p{self._num_prefills - 1}"

    # As an applicant.

    def place(self, now_s: float) -> Placement:
        """See :meth:`router.applicant.Applicant.place`."""
        factor = self._context.tpot_factor()
        self.aimed_tpot_s = self._request.tpot_slo_s / factor
        candidates, routing = self._candidates(), self._routing(now_s, factor)
        decision = self._decide(candidates, routing, ())
        self._explain(candidates, routing, decision)
        return judge(
            decision,
            {candidate.worker_id: candidate for candidate in candidates},
            routing,
            self._context.limits,
            tpot_slo_s=self._context.tpot_slo_s / factor,
        )

    def send(self, placement: Placement) -> None:
        """It goes where it was placed."""
        if not self.sent.done():
            self._book(placement.decision)
            self.predicted_ttft_s = placement.ttft_s
            self.sent.set_result(placement.decision)

    def refuse(self, error: Exception) -> None:
        """It does not go anywhere."""
        if not self.sent.done():
            self.sent.set_exception(error)

    # Decisions.

    def what_if(self) -> dict[str, Any]:
        """What would be decided now, and why (:mod:`router.explain`); nothing is booked.

        Raises:
            core.errors.NoWorkerAvailable: nobody serves it.
        """
        candidates, routing = self._candidates(), self._routing(self._context.clock.now_s())
        return explain(self._context.policy, candidates, routing, self._decide(candidates, routing, ()))

    def choose(self, tried: Sequence[str]) -> Decision:
        """Decides anew, past the workers that have failed it.

        Raises:
            core.errors.NoWorkerAvailable: nobody is left.
        """
        candidates, routing = self._candidates(), self._routing(self._context.clock.now_s())
        decision = self._decide(candidates, routing, tried)
        self._explain(candidates, routing, decision)
        self._book(decision)
        return decision

    def choose_any(self, tried: Sequence[str]) -> Decision:
        """Some worker that does it all, whatever its role: better than to give up what has begun.

        Raises:
            core.errors.NoWorkerAvailable: nobody is left.
        """
        candidates, routing = self._candidates(), self._routing(self._context.clock.now_s())
        worker_id = self._context.policy.choose_prefill_only(candidates, routing, tried)
        if self._request.path is Path.PREFILL_ONLY:
            decision = Decision(decode_worker="", prefill_worker=worker_id, reason=LAST_RESORT)
        else:
            decision = Decision(decode_worker=worker_id, prefill_worker=None, reason=LAST_RESORT)
        self._explain(candidates, routing, decision)
        self._book(decision)
        return decision

    def _decide(
        self, candidates: Sequence[Candidate], routing: RoutingRequest, tried: Sequence[str]
    ) -> Decision:
        if self._request.path is Path.PREFILL_ONLY:
            worker_id = self._context.policy.choose_prefill_only(candidates, routing, tried)
            return Decision(decode_worker="", prefill_worker=worker_id, reason="prefill_only")
        if self._request.path is Path.LOCAL:
            decision = self._context.policy.choose(self._decoders(candidates), routing, tried)
            return dataclasses.replace(decision, reason="local_request")
        return self._context.policy.choose(candidates, routing, tried)

    @staticmethod
    def _decoders(candidates: Sequence[Candidate]) -> list[Candidate]:
        return [candidate for candidate in candidates if candidate.role is Role.DECODE]

    def _candidates(self) -> list[Candidate]:
        """Workers of one kind of weights: an answer's that has begun, else any.

        They are picked for each decision, since during an update they change while a request waits.
        """
        view, model = self._context.view, self._request.model
        self._revision = self._bound_to
        if self._revision is None:
            self._revision = self._context.policy.choose_revision(view.candidates(model))
        return view.candidates(model, self._revision)

    def _routing(self, now_s: float, tpot_factor: float = 1.0) -> RoutingRequest:
        """The request as the policy sees it now, its TPOT target divided by a factor."""
        request = self._request
        if self._blocks is not None:
            self._cached_tokens = self._context.view.cached_tokens(self._blocks)
        return RoutingRequest(
            prompt_tokens=self.prompt_tokens,
            now_s=now_s,
            waited_s=now_s - self.arrival_s,
            cached_tokens=self._cached_tokens,
            session=request.session,
            ttft_slo_s=request.ttft_slo_s,
            tpot_slo_s=request.tpot_slo_s / tpot_factor,
        )

    # Bookings.

    def _book(self, decision: Decision) -> None:
        self.give_back()
        self._count(decision)
        self._note(decision)
        view = self._context.view
        prefill, decode = view.member(decision.prefill_worker or ""), view.member(decision.decode_worker)
        for member in (prefill, decode):
            if member is not None:
                member.breaker.chosen()
        if prefill is not None:
            self._num_prefills += 1
            self._prefilling_at, self._expected_at = prefill, decode
            cached_tokens = self._cached_tokens.get(prefill.report.worker_id, 0)
            prefill.view.prefill_sent(
                self.prefill_id,
                self.prompt_tokens,
                prefill.view.queued_prefill_s(self.prompt_tokens, cached_tokens),
                cached_tokens=cached_tokens,
            )
            self._prompt_sent(prefill)
            if decode is not None:
                ttft_s, waited_s = decision.ttft_s, self._context.clock.now_s() - self.arrival_s
                in_s = None if ttft_s is None else ttft_s - waited_s
                decode.view.decode_expected(self.request_id, self.prompt_tokens, in_s)
        elif decode is not None and decision.prefill_worker is None:
            self._local_at = decode
            decode.view.decode_sent(self.prompt_tokens, self._predicted_prefill_s(decode))
            self._prompt_sent(decode)

    def _count(self, decision: Decision) -> None:
        if not self._trace.decisions:
            prefilled_by = decision.prefill_worker or decision.decode_worker
            cached_tokens = self._cached_tokens.get(prefilled_by, 0)
            self._context.traffic.placed(self.prompt_tokens, cached_tokens)

    def prefill_ended(self) -> None:
        """The prefill leg has an answer, or none will come."""
        if self._prefilling_at is not None:
            self._prefilling_at.view.prefill_ended(self.prefill_id)
        self._prefilling_at = None

    def decode_sent(self, member: Member, *, prefills: bool) -> None:
        """A decode leg is being sent.

        Args:
            prefills: the worker computes the prompt itself.
        """
        self._expect_no_more()
        if member is self._local_at:
            self._local_at = None  # it counts already
            return
        member.view.decode_sent(self.prompt_tokens, self._predicted_prefill_s(member) if prefills else 0.0)
        self._prompt_sent(member)

    def give_back(self) -> None:
        """Nothing of what is booked will come."""
        self.prefill_ended()
        self._expect_no_more()

    def _expect_no_more(self) -> None:
        if self._expected_at is not None:
            self._expected_at.view.decode_expected_no_more(self.request_id)
        self._expected_at = None

    def _predicted_prefill_s(self, member: Member) -> float:
        cached_tokens = self._cached_tokens.get(member.report.worker_id, 0)
        return member.view.predicted_prefill_s(self.prompt_tokens, cached_tokens)

    def _prompt_sent(self, member: Member) -> None:
        if self._blocks is not None:
            self._context.view.prompt_sent(member, self._blocks)

    def _note(self, decision: Decision) -> None:
        self._trace.decisions.append(decision)
        if self._explained is not None:
            self._trace.explanations.append(self._explained)
            logger.info(
                "routed", extra=fields(request_id=self._trace.request_id, explanation=self._explained)
            )

    def _explain(self, candidates: Sequence[Candidate], routing: RoutingRequest, decision: Decision) -> None:
        """Keeps what a decision was made from until it is taken, if the client asked for it."""
        if self._request.explain:
            self._explained = explain(self._context.policy, candidates, routing, decision)
