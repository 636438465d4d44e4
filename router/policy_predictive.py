"""The routing policy that predicts: each request where it meets its targets at the least cost to others.

For every prefill worker the time to first token is predicted: what the request has waited, the prompts
in front of it, its own tokens that the worker's cache does not hold. For every decode worker the time of
a step with the request in its batch.

A decode worker may prefill a prompt itself where that is no more work than a step or two (most of it is
cached there), or where the prefill workers would be late and it would not: as long as its steps, stretched
by all the prompts it has taken lately and this one, keep the target of those that run there.

Among prefill workers the score is the predicted time plus the computing time the request takes there
(``WORK_WEIGHT``): what is computed again for want of a cache is taken from the requests behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.errors import NoWorkerAvailable
from core.performance_model import StepTime
from router.policy import LeastLoadPolicy, by_role, decode_load
from router.routing import Candidate, Decision, RoutingRequest
from router.step_times import prefill_s
from router.worker_view import LOCAL_PREFILL_WINDOW_S

WORK_WEIGHT = 1.0
LATE = 0.8
"""Prefill workers are late beyond this share of the target."""
TPOT_MARGIN = 0.9
CHEAP_STEPS = 2.0
"""A prompt that takes no longer than this many decode steps may be prefilled where it is decoded."""
_NEAR = 1.02
"""Scores this close are equal: the pick among them is random, so that routers do not herd."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    candidate: Candidate
    done_s: float
    """From now to the first token."""
    work_s: float
    """Computing time it takes on the worker."""


class PredictivePolicy(LeastLoadPolicy):
    """Predicts TTFT and TPOT on every worker. Without step times it balances load."""

    reason = "predicted"

    def choose(
        self, candidates: Sequence[Candidate], request: RoutingRequest, excluded: Iterable[str] = ()
    ) -> Decision:
        if any(candidate.step_time is None for candidate in candidates):
            return super().choose(candidates, request, excluded)
        prefills, decodes = by_role(candidates, excluded)
        if not decodes:
            raise NoWorkerAvailable("no decode worker is available")
        decode, tpot_s = self._best_decode(decodes, request)
        if not prefills:
            local = _prefill_on(decode, request)
            return self._decision(decode, None, "no_prefill_worker", request, local.done_s, tpot_s)
        best = self._best_prefill(prefills, request)
        sooner = self._local(decodes, request, best)
        if sooner is not None:
            step_s = _stretched_step_s(sooner, request)
            return self._decision(sooner.candidate, None, "local", request, sooner.done_s, step_s)
        return self._decision(decode, best.candidate, self.reason, request, best.done_s, tpot_s)

    def _local(
        self, decodes: Sequence[Candidate], request: RoutingRequest, remote: _Prefill
    ) -> _Prefill | None:
        """The decode worker that had better prefill by itself, if there is one."""
        late = request.waited_s + remote.done_s > LATE * request.ttft_slo_s
        options = []
        for candidate in decodes:
            if _kv_room(candidate) < request.prompt_tokens:
                continue
            option = _prefill_on(candidate, request)
            cheap = option.work_s <= CHEAP_STEPS * _decode_step_s(candidate, request)
            if not (late or cheap) or option.done_s >= remote.done_s:
                continue
            if _stretched_step_s(option, request) <= TPOT_MARGIN * request.tpot_slo_s:
                options.append(option)
        if not options:
            return None
        return min(options, key=lambda option: (option.done_s + WORK_WEIGHT * option.work_s, option.work_s))

    def choose_prefill_only(
        self, candidates: Sequence[Candidate], request: RoutingRequest, excluded: Iterable[str] = ()
    ) -> str:
        if any(candidate.step_time is None for candidate in candidates):
            return super().choose_prefill_only(candidates, request, excluded)
        prefills, decodes = by_role(candidates, excluded)
        if not prefills and not decodes:
            raise NoWorkerAvailable("no worker is available")
        return self._best_prefill(prefills or decodes, request).candidate.worker_id

    def _best_prefill(self, candidates: Sequence[Candidate], request: RoutingRequest) -> _Prefill:
        options = [_prefill_on(candidate, request) for candidate in candidates]
        scores = [option.done_s + WORK_WEIGHT * option.work_s for option in options]
        limit = _NEAR * min(scores)
        return self._random.choice(
            [option for option, score in zip(options, scores, strict=True) if score <= limit]
        )

    def _best_decode(
        self, candidates: Sequence[Candidate], request: RoutingRequest
    ) -> tuple[Candidate, float]:
        roomy = [c for c in candidates if _kv_room(c) >= request.prompt_tokens] or candidates
        options = [(_decode_step_s(candidate, request), candidate) for candidate in roomy]
        limit = _NEAR * min(step_s for step_s, _ in options)
        near = [(decode_load(c), step_s, c) for step_s, c in options if step_s <= limit]
        least = min(load for load, _, _ in near)
        _, step_s, candidate = self._random.choice([option for option in near if option[0] == least])
        return candidate, step_s

    @staticmethod
    def _decision(
        decode: Candidate,
        prefill: Candidate | None,
        reason: str,
        request: RoutingRequest,
        done_s: float,
        tpot_s: float,
    ) -> Decision:
        return Decision(
            decode_worker=decode.worker_id,
            prefill_worker=None if prefill is None else prefill.worker_id,
            reason=reason,
            ttft_s=request.waited_s + done_s,
            tpot_s=tpot_s,
        )


def _prefill_on(candidate: Candidate, request: RoutingRequest) -> _Prefill:
    cached_tokens = request.cached_tokens.get(candidate.worker_id, 0)
    work_s = prefill_s(_step_time(candidate), request.prompt_tokens, cached_tokens)
    queue_s = max(0.0, candidate.prefill_free_at_s - request.now_s)
    return _Prefill(candidate, queue_s + work_s, work_s)


def _stretched_step_s(local: _Prefill, request: RoutingRequest) -> float:
    """Mean time of the decode worker's steps while it also computes prompts, this one among them."""
    share = local.candidate.local_prefill_share + local.work_s / LOCAL_PREFILL_WINDOW_S
    return _decode_step_s(local.candidate, request) / max(1.0 - share, 1e-9)


def _decode_step_s(candidate: Candidate, request: RoutingRequest) -> float:
    kv_tokens = candidate.kv_used_tokens + request.prompt_tokens
    return _step_time(candidate).step_s((), candidate.num_requests + 1, kv_tokens)


def _kv_room(candidate: Candidate) -> int:
    return candidate.kv_capacity_tokens - candidate.kv_used_tokens


def _step_time(candidate: Candidate) -> StepTime:
    assert candidate.step_time is not None
    return candidate.step_time
