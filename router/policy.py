"""Routing policies that balance load: filter, score, pick. They neither predict nor look into caches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from core.errors import NoWorkerAvailable
from core.types import Role
from router.routing import NO_PREFILL_WORKER, Candidate, Decision, RoutingPolicy, RoutingRequest


class PlainPolicy(RoutingPolicy):
    """Picks a prefill and a decode worker independently of each other; subclasses say which.

    Args:
        random_seed: breaks ties, so that routers with one snapshot do not all pick the same worker.
    """

    reason = ""
    uses_caches = False
    predicts = False

    def __init__(self, random_seed: int | None = None) -> None:
        self._random = random.Random(random_seed)

    def choose_revision(self, candidates: Sequence[Candidate]) -> str | None:
        usable = [c for c in candidates if c.role is Role.DECODE] or candidates
        return self._random.choice(usable).revision if usable else None

    def choose(
        self, candidates: Sequence[Candidate], request: RoutingRequest, excluded: Iterable[str] = ()
    ) -> Decision:
        prefills, decodes = by_role(candidates, excluded)
        if not decodes:
            raise NoWorkerAvailable("no decode worker is available")
        decode = self.pick_decode(decodes)
        if not prefills:
            return Decision(decode_worker=decode.worker_id, prefill_worker=None, reason=NO_PREFILL_WORKER)
        prefill = self.pick_prefill(prefills)
        return Decision(decode_worker=decode.worker_id, prefill_worker=prefill.worker_id, reason=self.reason)

    def choose_prefill_only(
        self, candidates: Sequence[Candidate], request: RoutingRequest, excluded: Iterable[str] = ()
    ) -> str:
        prefills, decodes = by_role(candidates, excluded)
        if not prefills and not decodes:
            raise NoWorkerAvailable("no worker is available")
        return self.pick_prefill(prefills or decodes).worker_id

    def score(self, candidate: Candidate, request: RoutingRequest) -> float | None:
        return None

    def pick_prefill(self, candidates: Sequence[Candidate]) -> Candidate:
        """One of at least one."""
        raise NotImplementedError

    def pick_decode(self, candidates: Sequence[Candidate]) -> Candidate:
        """One of at least one."""
        raise NotImplementedError


class LeastLoadPolicy(PlainPolicy):
    """Least queued prompt tokens for prefill, most free KV and shortest batch for decode."""

    reason = "least_load"

    def score(self, candidate: Candidate, request: RoutingRequest) -> float | None:
        return candidate.prefill_load if candidate.role is Role.PREFILL else candidate.decode_load

    def pick_prefill(self, candidates: Sequence[Candidate]) -> Candidate:
        return self._least(candidates, [c.prefill_load for c in candidates])

    def pick_decode(self, candidates: Sequence[Candidate]) -> Candidate:
        return self._least(candidates, [c.decode_load for c in candidates])

    def _least(self, candidates: Sequence[Candidate], loads: Sequence[float]) -> Candidate:
        least = min(loads)
        return self._random.choice([c for c, load in zip(candidates, loads, strict=True) if load == least])


class PowerOfTwoPolicy(LeastLoadPolicy):
    """The less loaded of two drawn at random."""

    reason = "power_of_two"

    def pick_prefill(self, candidates: Sequence[Candidate]) -> Candidate:
        return super().pick_prefill(self._two(candidates))

    def pick_decode(self, candidates: Sequence[Candidate]) -> Candidate:
        return super().pick_decode(self._two(candidates))

    def _two(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return candidates if len(candidates) < 2 else self._random.sample(candidates, 2)


class RandomPolicy(PlainPolicy):
    """Any of them."""

    reason = "random"

    def pick_prefill(self, candidates: Sequence[Candidate]) -> Candidate:
        return self._random.choice(candidates)

    pick_decode = pick_prefill


class RoundRobinPolicy(PlainPolicy):
    """One after another."""

    reason = "round_robin"

    def __init__(self, random_seed: int | None = None) -> None:
        super().__init__(random_seed)
        self._num_picked = dict.fromkeys(Role, 0)

    def pick_prefill(self, candidates: Sequence[Candidate]) -> Candidate:
        return self._next(candidates)

    def pick_decode(self, candidates: Sequence[Candidate]) -> Candidate:
        return self._next(candidates)

    def _next(self, candidates: Sequence[Candidate]) -> Candidate:
        role = candidates[0].role
        self._num_picked[role] += 1
        return candidates[self._num_picked[role] % len(candidates)]


def by_role(
    candidates: Sequence[Candidate], excluded: Iterable[str]
) -> tuple[list[Candidate], list[Candidate]]:
    """Prefill and decode workers that are not excluded."""
    prefill = Role.PREFILL  # an enum's members are slow to look up, and there may be many candidates
    if out := frozenset(excluded):
        candidates = [c for c in candidates if c.worker_id not in out]
    return [c for c in candidates if c.role is prefill], [c for c in candidates if c.role is not prefill]
