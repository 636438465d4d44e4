"""What a request would meet on each worker: when its prompt would be done, how long a token would take.

Predictions only; :mod:`router.policy_predictive` chooses among them. All times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from core.performance_model import StepTime
from core.step_times import prefill_s
from router.routing import Candidate, RoutingRequest
from router.worker_view import LOCAL_PREFILL_WINDOW_S

HANDOFF_TOKENS = 10
"""Tokens over which a handoff's time is spread: few, for short answers feel it most."""
LINK_BYTES_PER_S = 40e9
"""What the way between two workers is taken to carry..."""
SAME_NODE_BYTES_PER_S = 200e9
"""...and inside one node."""


class PrefillOption(NamedTuple):
    """The request's prompt on one worker."""

    candidate: Candidate
    queue_s: float
    """From now until the prompts in front are computed."""
    work_s: float
    """Computing time it takes on the worker."""
    done_s: float
    """From now to the first token."""


class DecodeOption(NamedTuple):
    """The request's answer on one worker."""

    candidate: Candidate
    step_s: float
    """With the request in the batch, not stretched."""
    tpot_s: float
    """Mean time a token, stretched by the prompts that the worker prefills itself."""


def prefills_on(candidates: Sequence[Candidate], request: RoutingRequest) -> list[PrefillOption]:
    """The request's prefill on each; most workers are of one kind and have as little cached."""
    work_s_by_kind: dict[tuple[StepTime, int], float] = {}
    cached_tokens_of, now_s = request.cached_tokens.get, request.now_s
    options = []
    for candidate in candidates:
        kind = step_time_of(candidate), cached_tokens_of(candidate.worker_id, 0)
        if (work_s := work_s_by_kind.get(kind)) is None:
            step_time, cached_tokens = kind
            work_s = work_s_by_kind[kind] = prefill_s(step_time, request.prompt_tokens, cached_tokens)
        queue_s = candidate.prefill_free_at_s - now_s
        if queue_s < 0.0:
            queue_s = 0.0
        options.append(PrefillOption(candidate, queue_s, work_s, queue_s + work_s))
    return options


def evicted_s(option: PrefillOption, request: RoutingRequest, fastest_s: float) -> float:
    """Computing time lost with what the prompt evicts from the worker's cache.

    Its new tokens take the place of as many others where the cache is full. Those are worth the less, the
    longer they have lain there.

    Args:
        fastest_s: how long what is evicted next has lain in the cache that turns over fastest.
    """
    candidate = option.candidate
    new_tokens = request.prompt_tokens - request.cached_tokens.get(candidate.worker_id, 0)
    evicted_tokens = new_tokens - candidate.cache_free_tokens
    age_s = request.now_s - candidate.cache_oldest_at_s
    if evicted_tokens <= 0 or not 0 < age_s < inf:
        return 0.0
    return option.work_s * evicted_tokens / new_tokens * fastest_s / age_s


def decodes_on(candidates: Sequence[Candidate], request: RoutingRequest) -> list[DecodeOption]:
    """The request's decoding on each."""
    prompt_tokens = request.prompt_tokens
    options = []
    for candidate in candidates:
        kv_tokens = candidate.kv_used_tokens + prompt_tokens
        step_s = step_time_of(candidate).step_s((), candidate.num_requests + 1, kv_tokens)
        tpot_s = stretched_s(candidate, step_s, 0.0) if candidate.local_prefill_share else step_s
        options.append(DecodeOption(candidate, step_s, tpot_s))
    return options


def stretched_s(candidate: Candidate, step_s: float, local_prefill_s: float) -> float:
    """Mean time of the worker's steps while it also computes prompts, one more of them."""
    share = candidate.local_prefill_share + local_prefill_s / LOCAL_PREFILL_WINDOW_S
    return step_s / max(1.0 - share, 1e-9)


def is_late(option: PrefillOption, request: RoutingRequest) -> bool:
    """Whether the first token would miss its target."""
    return request.waited_s + option.done_s > request.ttft_slo_s


def decode_score_s(option: DecodeOption, request: RoutingRequest, node_id: str = "") -> float:
    """The time of a token, with its share of the handoff's time.

    Args:
        node_id: where it is prefilled; empty if that is not known.
    """
    candidate = option.candidate
    missing_tokens = request.prompt_tokens - request.cached_tokens.get(candidate.worker_id, 0)
    near = node_id and candidate.node_id == node_id
    bytes_per_s = SAME_NODE_BYTES_PER_S if near else LINK_BYTES_PER_S
    handoff_s = missing_tokens * candidate.kv_bytes_per_token / bytes_per_s
    return option.tpot_s + handoff_s / HANDOFF_TOKENS


def kv_room(candidate: Candidate) -> int:
    """Tokens that still fit."""
    return candidate.kv_capacity_tokens - candidate.kv_used_tokens


def step_time_of(candidate: Candidate) -> StepTime:
    """The candidate's, which must be known."""
    assert candidate.step_time is not None
    return candidate.step_time
