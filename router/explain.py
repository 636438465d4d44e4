"""What a routing decision was made from, as plain data for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from core.step_times import prefill_s
from router.routing import Candidate, Decision, RoutingPolicy, RoutingRequest


def explain(
    policy: RoutingPolicy, candidates: Sequence[Candidate], request: RoutingRequest, decision: Decision
) -> dict[str, Any]:
    """A decision beside all that was known of every worker.

    Returns:
        For JSON: the request, the decision, and one entry a worker, the best score of each role first.
    """
    rows = [_row(policy, candidate, request) for candidate in candidates]
    rows.sort(key=lambda row: (row["role"], row["score"] is None, row["score"] or 0.0))
    return {
        "prompt_tokens": request.prompt_tokens,
        "waited_s": request.waited_s,
        "ttft_slo_s": _finite(request.ttft_slo_s),
        "tpot_slo_s": _finite(request.tpot_slo_s),
        "decision": asdict(decision),
        "candidates": rows,
    }


def _row(policy: RoutingPolicy, candidate: Candidate, request: RoutingRequest) -> dict[str, Any]:
    cached_tokens = request.cached_tokens.get(candidate.worker_id, 0)
    step_time, predicted = candidate.step_time, {}
    if step_time is not None:
        kv_tokens = candidate.kv_used_tokens + request.prompt_tokens
        predicted = {
            "queue_s": max(0.0, candidate.prefill_free_at_s - request.now_s),
            "prefill_s": prefill_s(step_time, request.prompt_tokens, cached_tokens),
            "decode_step_s": step_time.step_s((), candidate.num_requests + 1, kv_tokens),
        }
    return {
        "worker_id": candidate.worker_id,
        "role": candidate.role.value,
        "node_id": candidate.node_id,
        "score": policy.score(candidate, request),
        "cached_tokens": cached_tokens,
        "num_requests": candidate.num_requests,
        "waiting_prefill_tokens": candidate.waiting_prefill_tokens,
        "kv_free_tokens": candidate.kv_capacity_tokens - candidate.kv_used_tokens,
        **predicted,
    }


def _finite(seconds: float) -> float | None:
    return seconds if seconds < float("inf") else None
