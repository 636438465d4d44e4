"""The routing decision: a snapshot in, a pair of workers out. Filter, score, pick."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from core.errors import NoWorkerAvailable
from core.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker as the policy sees it: its last reported load plus what was sent to it since."""

    worker_id: str
    role: Role
    revision: str = ""
    """Which weights it runs; workers of unlike revisions never share a request."""
    num_requests: int
    """Running and waiting."""
    waiting_prefill_tokens: int
    kv_used_tokens: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Who runs the request."""

    decode_worker: str
    prefill_worker: str | None
    """None: the decode worker prefills by itself."""
    reason: str


class LoadBalancingPolicy:
    """Least loaded prefill worker by queued prompt tokens, least loaded decode worker by KV and batch.

    Args:
        random_seed: breaks ties, so that routers with one snapshot do not all pick the same worker.
    """

    def __init__(self, random_seed: int | None = None) -> None:
        self._random = random.Random(random_seed)

    def choose_revision(self, candidates: Sequence[Candidate]) -> str | None:
        """Picks the weights for a request: during an update, in proportion to the workers that decode.

        Returns:
            None if there are no candidates.
        """
        usable = [c for c in candidates if c.role is Role.DECODE] or candidates
        return self._random.choice(usable).revision if usable else None

    def choose(
        self, candidates: Sequence[Candidate], prompt_tokens: int, excluded: Iterable[str] = ()
    ) -> Decision:
        """Picks a decode worker and, if there is one, a prefill worker.

        Args:
            candidates: workers of the model that are reachable and not draining.
            prompt_tokens: length of the prompt.
            excluded: workers that have already failed this request.

        Raises:
            NoWorkerAvailable: no worker can decode.
        """
        usable = self._filter(candidates, excluded)
        decode = self._pick([c for c in usable if c.role is Role.DECODE], _decode_score)
        if decode is None:
            raise NoWorkerAvailable("no decode worker is available")
        prefill = self._pick([c for c in usable if c.role is Role.PREFILL], _prefill_score)
        if prefill is None:
            return Decision(decode_worker=decode.worker_id, prefill_worker=None, reason="no_prefill_worker")
        return Decision(
            decode_worker=decode.worker_id, prefill_worker=prefill.worker_id, reason="least_loaded"
        )

    def choose_prefill_only(self, candidates: Sequence[Candidate], excluded: Iterable[str] = ()) -> str:
        """Picks a worker for a request that ends with its first token.

        Raises:
            NoWorkerAvailable: there is no worker at all.
        """
        usable = self._filter(candidates, excluded)
        prefill = [c for c in usable if c.role is Role.PREFILL]
        chosen = self._pick(prefill or usable, _prefill_score)
        if chosen is None:
            raise NoWorkerAvailable("no worker is available")
        return chosen.worker_id

    @staticmethod
    def _filter(candidates: Sequence[Candidate], excluded: Iterable[str]) -> list[Candidate]:
        out = frozenset(excluded)
        return [c for c in candidates if c.worker_id not in out]

    def _pick(self, candidates: Sequence[Candidate], score: Callable[[Candidate], float]) -> Candidate | None:
        if not candidates:
            return None
        scored = [(score(c), c) for c in candidates]
        best = max(points for points, _ in scored)
        return self._random.choice([c for points, c in scored if points == best])


def _prefill_score(candidate: Candidate) -> float:
    """1 for an idle worker, towards 0 with queued work."""
    backlog = candidate.waiting_prefill_tokens + 64 * candidate.num_requests
    return 1.0 / (1.0 + backlog / 1024)


def _decode_score(candidate: Candidate) -> float:
    """1 for an idle worker, towards 0 with a full cache or a long batch."""
    kv_free = 1.0 - min(candidate.kv_used_tokens / max(candidate.kv_capacity_tokens, 1), 1.0)
    return (kv_free + 1.0 / (1.0 + candidate.num_requests / 8)) / 2
