"""Where a request would run if it were sent now, and whether there is room for it there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from core.step_times import prefill_s
from router.admission_limits import AdmissionLimits
from router.routing import NO_PREFILL_WORKER, Candidate, Decision, RoutingRequest

_FULL_BATCHES = 2
"""Without step times, a worker with prompts for this many full steps has no room."""
_OUT_OF_REACH = 1.5
"""Where even an empty decode worker misses the target, its steps may become this many times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A policy's decision, judged."""

    decision: Decision
    has_room: bool
    room_in_s: float = 0.0
    """When to look again if nothing is heard before; inf: only news of the workers can make room."""
    ttft_s: float | None = None
    """Predicted time to first token, from arrival, if sent now; None where no step times are known."""
    work_s: float | None = None
    """Predicted computing time of the prompt on the chosen worker."""


def judge(
    decision: Decision,
    candidates: Mapping[str, Candidate],
    request: RoutingRequest,
    limits: AdmissionLimits,
    *,
    tpot_slo_s: float = math.inf,
) -> Placement:
    """Says whether the workers of a decision have room for the request.

    Args:
        decision: a policy's; an empty ``decode_worker`` stands for a request that ends with its prefill.
        candidates: at least the workers of the decision, by id.
        request: as the policy saw it.
        tpot_slo_s: the target of the other requests there, which counts too.
    """
    prefill = candidates[decision.prefill_worker or decision.decode_worker]
    decode_has_room = True
    if decision.decode_worker:
        decode = candidates[decision.decode_worker]
        tpot_s = decision.tpot_s or _tpot_s(decode, request)
        target_s = limits.tpot_share * min(request.tpot_slo_s, tpot_slo_s)
        decode_has_room = _can_decode(decode, request, limits, tpot_s, target_s)
    room_in_s = 0.0 if decode_has_room else math.inf
    step_time = prefill.step_time
    if step_time is None:
        if not _can_queue(prefill):
            room_in_s = math.inf
        return Placement(decision=decision, has_room=not room_in_s, room_in_s=room_in_s)
    starts_in_s = max(0.0, prefill.prefill_free_at_s - request.now_s)
    ahead_s = limits.dispatch_ahead_s
    if decision.prefill_worker is not None and not prefill.own_prefills:
        ahead_s = math.inf  # each router has one there at least: nobody else brings it news of the queue
    elif decision.prefill_worker is None and prefill.num_requests and decision.reason != NO_PREFILL_WORKER:
        ahead_s = 0.0  # others decode there: one prompt at a time, whichever router sends it
    room_in_s = max(room_in_s, starts_in_s - ahead_s)
    if decision.ttft_s is None:
        cached_tokens = request.cached_tokens.get(prefill.worker_id, 0)
        work_s = prefill_s(step_time, request.prompt_tokens, cached_tokens)
        ttft_s = request.waited_s + starts_in_s + work_s
    else:
        ttft_s = decision.ttft_s
        work_s = max(0.0, ttft_s - request.waited_s - starts_in_s)
    return Placement(
        decision=decision,
        has_room=not room_in_s,
        room_in_s=room_in_s,
        ttft_s=ttft_s,
        work_s=work_s,
    )


def _tpot_s(worker: Candidate, request: RoutingRequest) -> float | None:
    """Of a decode worker's batch with one more."""
    if worker.step_time is None:
        return None
    return worker.step_time.step_s((), worker.num_requests + 1, worker.kv_used_tokens + request.prompt_tokens)


def _can_decode(
    worker: Candidate,
    request: RoutingRequest,
    limits: AdmissionLimits,
    tpot_s: float | None,
    target_s: float,
) -> bool:
    """Whether a decode worker keeps its target with one more; an empty one takes anything."""
    if not worker.num_requests:
        return True
    if worker.num_requests >= worker.max_num_seqs > 0:
        return False
    if worker.kv_used_tokens + request.prompt_tokens > limits.kv_share * worker.kv_capacity_tokens:
        return False
    step_time = worker.step_time
    if step_time is None or tpot_s is None or tpot_s <= target_s:
        return True
    alone_s = step_time.step_s((), 1, request.prompt_tokens)
    return alone_s > target_s and tpot_s <= _OUT_OF_REACH * alone_s


def _can_queue(worker: Candidate) -> bool:
    """Whether a worker whose steps nobody can predict takes one more prompt."""
    if worker.num_requests >= worker.max_num_seqs > 0:
        return False
    full_tokens = _FULL_BATCHES * worker.max_num_batched_tokens
    return not full_tokens or worker.waiting_prefill_tokens < full_tokens
