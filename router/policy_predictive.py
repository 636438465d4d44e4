"""The routing policy that predicts: each request where it meets its targets at the least cost to others.

Prefill. For every worker the time to first token is predicted: what the request has waited, the prompts in
front of it, its own tokens that the worker's cache does not hold. The soonest worker gets it, unless what the
prompt would evict from its cache is worth more than the time it gains. For a cache's sake nobody waits in
line, though: the other worker must be able to begin about as soon.

A request that will be late wherever it goes (a prompt too long for the target, mostly) harms least where
others are late already. Workers queue in order of arrival, so late requests spread over all of them would
make every queue too long for the rest. While the workers that can still be in time are all but idle, the
soonest one takes it all the same. Else it joins the longest queue, as long as it waits no longer than
``PATIENCE_S`` there.

Workers that are about as good are picked from at random, or, for a request of a session, by the session:
so a conversation stays where it is as long as that costs it next to nothing.

Decode. For every worker the time of a step with the request in its batch is predicted, stretched by the
prompts it prefills itself, and the handoff's time, of which a prefix in its cache takes off and which is
less inside a node. The shortest wins. Where no step would keep the target, one more request on each worker
would cost all of them their target: the slowest worker takes what exceeds the others, and late requests
too.

After a role switch a prefill worker still has answers to finish. Until few are left beside the prompt, it
takes prompts as a decode worker does, see below.

Local prefill. A decode worker prefills by itself a prompt that it mostly has cached, or, one at a time,
those for which the prefill workers would be late and it would not, as long as its own steps keep their
target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from core.errors import NoWorkerAvailable
from core.step_times import prefill_s
from core.types import Role
from router.affinity import preferred
from router.policy import LeastLoadPolicy, by_role
from router.routing import NO_PREFILL_WORKER, Candidate, Decision, RoutingRequest
from router.worker_options import (
    DecodeOption,
    PrefillOption,
    decode_score_s,
    decodes_on,
    evicted_s,
    is_late,
    kv_room,
    prefills_on,
    step_time_of,
    stretched_s,
)

IN_TIME = 0.8
"""Share of the TTFT target up to which a prediction is taken to hold: prefill workers with a longer queue
cannot be in time, and where they would take longer for a request, decode workers may help out."""
PRESSED = 0.3
"""Late requests keep away from workers in time when the others' queues would come to this share of the
target."""
PATIENCE_S = 30.0
"""Longest queue that a late request joins for the sake of others."""
EVICTION_WEIGHT = 3.0
"""Of the computing time that is lost with what a prompt evicts."""
WAIT_FOR_A_CACHE_S = 0.1
"""Longest queue that a request joins to spare the soonest worker's cache, unless that one's is longer: what
routers send ahead by default, so that nobody waits in line for an empty cache while a worker is idle."""
TPOT_MARGIN = 0.95
"""Share of the TPOT target up to which a decode worker is filled..."""
LOCAL_TPOT_MARGIN = 0.9
"""...and up to which it prefills by itself: prompts come in bursts, which a mean does not show."""
LEFTOVER_S = 5.0
"""A prefill worker spares the answers it still has if they would stand still for longer than this, all
together, while it computes a prompt."""
SLOWEST = 2.0
"""The decode worker that takes the excess is filled up to this many times the target."""
CACHED_PART = 0.5
"""A prompt is mostly cached where it takes no more than this part of what it takes elsewhere."""
_NEAR = 1.02
"""Scores this close are equal: the pick among them is random, so that routers do not herd."""
_NEAR_FOR_A_SESSION = 1.1
"""...and these where a session has a favourite among them."""

_OptionT = TypeVar("_OptionT", PrefillOption, DecodeOption)


class PredictivePolicy(LeastLoadPolicy):
    """Predicts TTFT and TPOT on every worker. Without step times it balances load."""

    reason = "predicted"
    uses_caches = True
    predicts = True

    def choose(
        self, candidates: Sequence[Candidate], request: RoutingRequest, excluded: Iterable[str] = ()
    ) -> Decision:
        if None in [candidate.step_time for candidate in candidates]:
            return super().choose(candidates, request, excluded)
        prefills, decodes = by_role(candidates, excluded)
        if not decodes:
            raise NoWorkerAvailable("no decode worker is available")
        targets = decodes_on(decodes, request)
        if not prefills:
            decode = self._best_decode(targets, request, late=False)
            (local,) = prefills_on([decode.candidate], request)
            return _decision(decode, None, NO_PREFILL_WORKER, request, local.done_s)
        best = self._best_prefill_of(prefills, request)
        if (sooner := _best_local(targets, request, best)) is not None:
            decode, local = sooner
            return _decision(decode, None, "local", request, local.done_s)
        late, node_id = is_late(best, request), best.candidate.node_id
        decode = self._best_decode(targets, request, late=late, node_id=node_id)
        return _decision(decode, best.candidate, self.reason, request, best.done_s)

    def _best_prefill_of(self, prefills: Sequence[Candidate], request: RoutingRequest) -> PrefillOption:
        """Workers with many answers left help out only."""
        free: list[Candidate] = []
        busy: list[Candidate] = []
        for candidate in prefills:
            (busy if _spares_answers(candidate, request) else free).append(candidate)
        if not free or not busy:
            return self._best_prefill(prefills_on(prefills, request), request)
        best = self._best_prefill(prefills_on(free, request), request)
        return _best_beside_answers(busy, request, best) or best

    def score(self, candidate: Candidate, request: RoutingRequest) -> float | None:
        if candidate.step_time is None:
            return super().score(candidate, request)
        if candidate.role is Role.DECODE:
            (decode,) = decodes_on([candidate], request)
            return decode_score_s(decode, request)
        (prefill,) = prefills_on([candidate], request)
        return prefill.done_s

    def choose_prefill_only(
        self, candidates: Sequence[Candidate], request: RoutingRequest, excluded: Iterable[str] = ()
    ) -> str:
        if None in [candidate.step_time for candidate in candidates]:
            return super().choose_prefill_only(candidates, request, excluded)
        prefills, decodes = by_role(candidates, excluded)
        if not prefills and not decodes:
            raise NoWorkerAvailable("no worker is available")
        options = prefills_on(prefills or decodes, request)
        return self._best_prefill(options, request).candidate.worker_id

    def _best_prefill(self, options: Sequence[PrefillOption], request: RoutingRequest) -> PrefillOption:
        soonest = min(options, key=lambda option: option.done_s)
        if is_late(soonest, request):
            return _least_harm(options, request, soonest)
        fastest_s = request.now_s - max([option.candidate.cache_oldest_at_s for option in options])

        def score_s(option: PrefillOption) -> float:
            return option.done_s + EVICTION_WEIGHT * evicted_s(option, request, fastest_s)

        enough_s, as_good_s = _near(request) * score_s(soonest), _near(request) * soonest.done_s
        short_s = max(soonest.queue_s, WAIT_FOR_A_CACHE_S)
        scored = [
            (score_s(option), option)
            for option in options
            if option.done_s <= as_good_s or (option.done_s <= enough_s and option.queue_s <= short_s)
        ]
        near_s = _near(request) * min([score for score, _ in scored])
        return self._pick([option for score, option in scored if score <= near_s], request)

    def _best_decode(
        self, options: Sequence[DecodeOption], request: RoutingRequest, *, late: bool, node_id: str = ""
    ) -> DecodeOption:
        roomy = [option for option in options if kv_room(option.candidate) >= request.prompt_tokens]
        options = roomy or options
        limit_s = TPOT_MARGIN * request.tpot_slo_s
        num_in_time = sum(option.tpot_s <= limit_s for option in options)
        if not num_in_time or (late and num_in_time < len(options)):
            slow = [option for option in options if option.tpot_s <= SLOWEST * request.tpot_slo_s]
            if slow:
                return max(slow, key=lambda option: option.tpot_s)
        scores_s = [decode_score_s(option, request, node_id) for option in options]
        limit_s = _near(request) * min(scores_s)
        near = [option for option, score_s in zip(options, scores_s, strict=True) if score_s <= limit_s]
        if request.session:
            return self._pick(near, request)
        least = min([option.candidate.decode_load for option in near])
        return self._random.choice([option for option in near if option.candidate.decode_load == least])

    def _pick(self, near: Sequence[_OptionT], request: RoutingRequest) -> _OptionT:
        """One of those that are about as good: the session's own, or any."""
        if not request.session:
            return self._random.choice(near)
        favourite = preferred(request.session, [option.candidate.worker_id for option in near])
        return next(option for option in near if option.candidate.worker_id == favourite)


def _near(request: RoutingRequest) -> float:
    """Up to what multiple of the best score others are about as good."""
    return _NEAR_FOR_A_SESSION if request.session else _NEAR


def _least_harm(
    options: Sequence[PrefillOption], request: RoutingRequest, soonest: PrefillOption
) -> PrefillOption:
    """Where a request that is late everywhere makes the fewest others late."""
    queues_s = [option.queue_s for option in options if option.queue_s <= IN_TIME * request.ttft_slo_s]
    if sum(queues_s) < PRESSED * request.ttft_slo_s * (len(queues_s) - 1):
        return soonest
    bearable = [option for option in options if option.queue_s <= PATIENCE_S]
    return max(bearable, key=lambda option: option.queue_s, default=soonest)


def _best_local(
    options: Sequence[DecodeOption], request: RoutingRequest, remote: PrefillOption
) -> tuple[DecodeOption, PrefillOption] | None:
    """The decode worker that had better prefill by itself, if there is one."""
    helps_out = request.waited_s + remote.done_s > IN_TIME * request.ttft_slo_s
    if not helps_out:
        options = [option for option in options if option.candidate.worker_id in request.cached_tokens]
    locals_ = prefills_on([option.candidate for option in options], request)
    able = []
    for decode, local in zip(options, locals_, strict=True):
        cheap = local.work_s <= CACHED_PART * remote.work_s
        if (
            (cheap or (helps_out and not local.queue_s and not is_late(local, request)))
            and local.done_s < remote.done_s
            and kv_room(decode.candidate) >= request.prompt_tokens
        ):
            tpot_s = stretched_s(decode.candidate, decode.step_s, local.work_s)
            if tpot_s <= LOCAL_TPOT_MARGIN * request.tpot_slo_s:
                able.append((decode._replace(tpot_s=tpot_s), local))
    return min(able, key=lambda pair: pair[1].done_s + pair[1].work_s, default=None)


def _spares_answers(candidate: Candidate, request: RoutingRequest) -> bool:
    """Whether a prefill worker has so many answers to finish that it should not take the prompt."""
    if not candidate.num_decoding:
        return False
    cached_tokens = request.cached_tokens.get(candidate.worker_id, 0)
    work_s = prefill_s(step_time_of(candidate), request.prompt_tokens, cached_tokens)
    return candidate.num_decoding * work_s > LEFTOVER_S


def _best_beside_answers(
    busy: Sequence[Candidate], request: RoutingRequest, remote: PrefillOption
) -> PrefillOption | None:
    """The prefill worker with answers left that had better take the prompt all the same, if there is one."""
    if request.waited_s + remote.done_s <= IN_TIME * request.ttft_slo_s:
        return None
    able = []
    for option in prefills_on(busy, request):
        candidate = option.candidate
        step_s = step_time_of(candidate).step_s((), candidate.num_decoding, candidate.kv_used_tokens)
        if (
            not option.queue_s
            and option.done_s < remote.done_s
            and stretched_s(candidate, step_s, option.work_s) <= LOCAL_TPOT_MARGIN * request.tpot_slo_s
        ):
            able.append(option)
    return min(able, key=lambda option: option.done_s, default=None)


def _decision(
    decode: DecodeOption, prefill: Candidate | None, reason: str, request: RoutingRequest, done_s: float
) -> Decision:
    return Decision(
        decode_worker=decode.candidate.worker_id,
        prefill_worker=None if prefill is None else prefill.worker_id,
        reason=reason,
        ttft_s=request.waited_s + done_s,
        tpot_s=decode.tpot_s,
    )
