"""What a routing decision is made from, and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.performance_model import StepTime
from core.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker as the policy sees it: its last reported load plus what was sent to it since."""

    worker_id: str
    role: Role
    revision: str = ""
    """Which weights it runs; workers of unlike revisions never share a request."""
    node_id: str = ""
    num_requests: int
    """Running and waiting."""
    waiting_prefill_tokens: int
    """Prompt tokens of requests without their first token."""
    prefill_free_at_s: float = 0.0
    """When the prompts sent to it so far will have been computed, on the router's clock."""
    local_prefill_share: float = 0.0
    """Share of the last seconds that it has computed prompts itself as a decode worker, 0 to 1 and over."""
    kv_used_tokens: int
    kv_capacity_tokens: int
    kv_bytes_per_token: int = 0
    step_time: StepTime | None = None
    """How long its steps take; None where nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRequest:
    """A request as the policy sees it."""

    prompt_tokens: int
    now_s: float = 0.0
    """The router's clock."""
    waited_s: float = 0.0
    """Since the request's arrival."""
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """Worker to leading prompt tokens in its cache; workers that hold none are left out."""
    ttft_slo_s: float = float("inf")
    tpot_slo_s: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Who runs the request."""

    decode_worker: str
    prefill_worker: str | None
    """None: the decode worker prefills by itself."""
    reason: str
    ttft_s: float | None = None
    """Predicted, from arrival; None where nothing was predicted."""
    tpot_s: float | None = None


class RoutingPolicy(Protocol):
    """Picks workers. Decisions are functions of what is passed in, and of a seed."""

    def choose_revision(self, candidates: Sequence[Candidate]) -> str | None:
        """Picks the weights for a request: during an update, in proportion to the workers that decode.

        Returns:
            None if there are no candidates.
        """

    def choose(
        self, candidates: Sequence[Candidate], request: RoutingRequest, excluded: Iterable[str] = ()
    ) -> Decision:
        """Picks a decode worker and, if there is one and it is worth it, a prefill worker.

        Args:
            candidates: workers of the model that are reachable and not draining.
            request: what is to be placed.
            excluded: workers that have already failed this request.

        Raises:
            NoWorkerAvailable: no worker can decode.
        """

    def choose_prefill_only(
        self, candidates: Sequence[Candidate], request: RoutingRequest, excluded: Iterable[str] = ()
    ) -> str:
        """Picks a worker for a request that ends with its first token.

        Raises:
            NoWorkerAvailable: there is no worker at all.
        """
