"""What a routing decision is made from, and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Protocol

from core.performance_model import StepTime
from core.record import record
from core.types import Role

NO_PREFILL_WORKER = "no_prefill_worker"
"""Reason of a decision for want of any prefill worker."""


@record
class Candidate:
    """A worker as the policy sees it: its last reported load plus what was sent to it since."""

    worker_id: str
    role: Role
    revision: str = ""
    """Which weights it runs; workers of unlike revisions never share a request."""
    node_id: str = ""
    num_requests: int
    """Running and waiting."""
    num_decoding: int = 0
    """Of those, the answers that go on: on a prefill worker, what is left of its time as a decode worker."""
    waiting_prefill_tokens: int
    """Prompt tokens of requests without their first token."""
    prefill_free_at_s: float = 0.0
    """When the prompts sent to it so far will have been computed, or were, on the router's clock."""
    own_prefills: int = 0
    """Prompts this router has sent and not heard back of."""
    local_prefill_share: float = 0.0
    """Share of the last seconds that it has computed prompts itself as a decode worker, 0 to 1 and over."""
    kv_used_tokens: int
    kv_capacity_tokens: int
    kv_bytes_per_token: int = 0
    max_num_seqs: int = 0
    """Most requests in one step; 0: not known."""
    max_num_batched_tokens: int = 0
    """Most tokens computed in one step; 0: not known."""
    cache_free_tokens: int = 0
    """Room in its prefix cache that nothing has been evicted from yet."""
    cache_oldest_at_s: float = float("-inf")
    """When what its prefix cache will evict next came there; minus infinity while there is room."""
    step_time: StepTime | None = None
    """How long its steps take; None where nobody knows."""
    prefill_load: float = field(init=False)
    """0 for an idle worker, up with queued prompt tokens; a request weighs 64 of them."""
    decode_load: float = field(init=False)
    """0 for an idle worker, towards 2 with a full cache and a long batch."""

    def __post_init__(self) -> None:
        # Here because a candidate is compared far more often than it changes.
        kv_use = min(self.kv_used_tokens / max(self.kv_capacity_tokens, 1), 1.0)
        decode_load = kv_use + 1.0 - 1.0 / (1.0 + self.num_requests / 8)
        object.__setattr__(self, "prefill_load", self.waiting_prefill_tokens + 64 * self.num_requests)
        object.__setattr__(self, "decode_load", decode_load)


@record
class RoutingRequest:
    """A request as the policy sees it."""

    prompt_tokens: int
    now_s: float = 0.0
    """The router's clock."""
    waited_s: float = 0.0
    """Since the request's arrival."""
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """Worker to leading prompt tokens in its cache; workers that hold none are left out."""
    session: str = ""
    """Requests of one session had better go to the same workers; empty for none."""
    ttft_slo_s: float = float("inf")
    tpot_slo_s: float = float("inf")


@record
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

    uses_caches: bool
    """False: what the workers have cached need not be looked up."""
    predicts: bool
    """False: when the workers' queues will be empty is not asked."""

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

    def score(self, candidate: Candidate, request: RoutingRequest) -> float | None:
        """What the worker is judged by among those of its role, lower is better; None if by nothing."""
