"""What operators ask a router: who is in the cluster, what happened to a request, where metrics are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field

from core.errors import NoWorkerAvailable
from router.cluster_view import ClusterView, Member
from router.trace import TraceLog

MetricsTargets = Callable[[], Awaitable[list[dict[str, Any]]]]
Explain = Callable[[str], dict[str, Any]]


class ExplainRequest(BaseModel):
    """A prompt to decide for without sending it."""

    prompt: str = Field(min_length=1)


def admin_routes(
    view: ClusterView, traces: TraceLog, metrics_targets: MetricsTargets, explain: Explain
) -> APIRouter:
    """Routes under /baton."""
    routes = APIRouter(prefix="/baton", tags=["baton"])

    @routes.get("/status")
    async def status() -> dict[str, Any]:
        """The cluster as this router sees it."""
        snapshot = view.snapshot
        return {
            "registry_incarnation": snapshot.incarnation if snapshot else None,
            "epoch": snapshot.epoch if snapshot else None,
            "workers": [_worker(member) for member in view.members()],
            "suspect_nodes": [asdict(node) for node in snapshot.suspect_nodes] if snapshot else [],
        }

    @routes.get("/requests/{request_id}")
    async def request(request_id: str) -> dict[str, Any]:
        """One of this router's latest finished requests: who ran which leg, how long, how many bytes."""
        trace = traces.get(request_id)
        if trace is None:
            raise HTTPException(404, f"this router has no finished request {request_id!r} in its log")
        return trace.as_dict()

    @routes.post("/explain")
    async def explain_prompt(request: ExplainRequest) -> dict[str, Any]:
        """Where this prompt would go now, and why: every worker with its score. Nothing is sent."""
        try:
            return explain(request.prompt)
        except NoWorkerAvailable as error:
            raise HTTPException(503, str(error)) from error
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    @routes.get("/prometheus-sd")
    async def prometheus_sd() -> list[dict[str, Any]]:
        """Targets for Prometheus's http_sd_configs: every process of the cluster."""
        return await metrics_targets()

    return routes


def _worker(member: Member) -> dict[str, Any]:
    report, seen = member.report, member.view.candidate()
    if report.trouble:
        state = "quarantined"
    elif report.draining:
        state = "draining"
    elif not member.link.up:
        state = "unreachable"
    else:
        state = "failing" if member.breaker.is_open else "ready"
    return {
        "worker_id": report.worker_id,
        "shape": report.shape,
        "model": report.model,
        "role": report.role.value,
        "state": state,
        "trouble": report.trouble,
        "node_id": report.node_id,
        "address": report.address,
        "metrics_address": report.metrics_address,
        "num_requests": seen.num_requests,
        "waiting_prefill_tokens": seen.waiting_prefill_tokens,
        "kv_used_blocks": member.view.load.kv_used_blocks,
        "num_pinned": member.view.load.num_pinned,
        "num_kv_blocks": report.num_kv_blocks,
        "block_size_tokens": report.block_size_tokens,
        "bytes_per_block": report.bytes_per_block,
        "max_num_seqs": report.max_num_seqs,
        "max_num_batched_tokens": report.max_num_batched_tokens,
    }
