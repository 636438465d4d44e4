"""The relay: runs requests against the workers of a view until they are answered."""

from __future__ import annotations

import math
from typing import Any

from core.clock import Clock
from core.errors import NoWorkerAvailable
from core.types import Role
from router.admission import AdmissionController
from router.admission_gate import AdmissionGate
from router.admission_limits import AdmissionLimits
from router.background import Background
from router.cluster_view import ClusterView
from router.lap_context import LapContext, RelayConfig
from router.placing import Placing, PlacingContext
from router.relay_request import Emit, RelayRequest
from router.request_run import RequestRun
from router.retry_budget import RetryBudget
from router.routing import RoutingPolicy
from router.trace import RequestTrace
from router.traffic_counter import TrafficCounter


class Relay:
    """One per router replica.

    Args:
        limits: of the requests that wait here for room on the workers; None sends everything at once.
        tpot_slo_s: the model's target.
        traffic: told of each request when it is first sent.
    """

    def __init__(
        self,
        view: ClusterView,
        policy: RoutingPolicy,
        config: RelayConfig,
        clock: Clock,
        *,
        limits: AdmissionLimits | None = None,
        tpot_slo_s: float = math.inf,
        traffic: TrafficCounter | None = None,
    ) -> None:
        self.view = view
        self.clock = clock
        self._laps = LapContext(view=view, config=config, clock=clock, background=Background())
        self._budget = RetryBudget(clock)
        controller = AdmissionController(limits or AdmissionLimits(), clock)
        self._placing = PlacingContext(
            view=view,
            policy=policy,
            clock=clock,
            limits=limits or AdmissionLimits(),
            tpot_slo_s=tpot_slo_s,
            tpot_factor=controller.lateness.tpot_factor,
            traffic=traffic or TrafficCounter(""),
        )
        self._gate = None
        if limits is not None:
            self._gate = AdmissionGate(controller, clock)
            view.on_news = self._gate.news

    @property
    def num_waiting(self) -> int:
        """Requests that wait here for room on the workers."""
        return 0 if self._gate is None else self._gate.num_waiting

    @property
    def waiting_prompt_tokens(self) -> int:
        """Prompt tokens of the requests that wait here."""
        return 0 if self._gate is None else self._gate.waiting_prompt_tokens

    def check_available(self, model: str) -> None:
        """
        Raises:
            NoWorkerAvailable: no worker could decode a request now.
        """
        if not any(candidate.role is Role.DECODE for candidate in self.view.candidates(model)):
            raise NoWorkerAvailable(f"no decode worker serves {model} now")

    def explain(self, request: RelayRequest, trace: RequestTrace) -> dict[str, Any]:
        """What would be decided for a request now, and why; nothing is sent.

        Raises:
            NoWorkerAvailable: no worker can take the request now.
        """
        return Placing(request, trace, self._placing).what_if()

    async def run(self, request: RelayRequest, trace: RequestTrace, emit: Emit) -> None:
        """Relays one request; ``emit`` gets every delta, the last with a finish reason.

        Cancelling it aborts the request everywhere.

        Raises:
            Rejected: too much is waiting already; no work has been done.
            NoWorkerAvailable: no worker can take the request now.
            WorkerLost: workers were lost until it may not be begun anew any more, or the answer had begun
                and cannot be taken up by another worker.
            ValueError: no worker accepts such a request.
        """
        self._budget.began()
        await RequestRun(self._laps, self._placing, self._gate, self._budget, request, trace, emit).run()
