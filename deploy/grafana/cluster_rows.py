"""Rows of the SLO dashboard about the cluster: handoff, workers, control plane."""

from __future__ import annotations

from deploy.grafana.panels import MODEL, REQUESTS, Panel, Query, Row, rate

HANDOFF = Row(
    title="Handoff",
    panels=(
        Panel(
            title="KV moved",
            description="KV bytes per second pulled from prefill to decode workers.",
            unit="Bps",
            queries=(Query(expr=f"sum({rate('baton_kv_transfer_bytes_total', REQUESTS)})", legend="pulled"),),
            width=6,
        ),
        Panel(
            title="Pinned prompts",
            description="Prefilled prompts whose KV waits on a prefill worker to be pulled.",
            unit="short",
            queries=(Query(expr=f"baton_worker_pinned_prompts{{{MODEL}}}", legend="{{worker}}"),),
            width=6,
        ),
        Panel(
            title="Fallbacks and recomputes",
            description="Prefills given to another worker or done locally; prompts recomputed, not pulled.",
            unit="cps",
            queries=(
                Query(
                    expr=f"sum by (reason) ({rate('baton_prefill_fallbacks_total', REQUESTS)})",
                    legend="fallback: {{reason}}",
                ),
                Query(
                    expr=f"sum by (reason) ({rate('baton_kv_recomputes_total', REQUESTS)})",
                    legend="recompute: {{reason}}",
                ),
            ),
            width=6,
        ),
        Panel(
            title="Expired leases",
            description="Leases of pinned KV that ended before a pull or a release, per second.",
            unit="cps",
            queries=(
                Query(
                    expr=f"sum by (worker) ({rate('baton_worker_leases_expired_total', MODEL)})",
                    legend="{{worker}}",
                ),
            ),
            width=6,
        ),
    ),
)

WORKERS = Row(
    title="Workers",
    panels=(
        Panel(
            title="Roles",
            description="Workers by the role they report; those that drain also as a dashed line.",
            unit="short",
            queries=(
                Query(expr=f"sum by (role) (baton_worker_role{{{MODEL}}})", legend="{{role}}"),
                Query(
                    expr=f"sum(baton_worker_draining{{{MODEL}}})",
                    legend="draining",
                    dashed=True,
                ),
            ),
            stacked=True,
        ),
        Panel(
            title="KV use",
            description="KV blocks held by requests over KV blocks of the engine.",
            unit="percentunit",
            queries=(
                Query(
                    expr=f"baton_worker_kv_used_blocks{{{MODEL}}}"
                    f" / baton_worker_kv_capacity_blocks{{{MODEL}}}",
                    legend="{{worker}}",
                ),
            ),
            max_value=1,
        ),
        Panel(
            title="Requests in the batch",
            description="Requests each engine runs.",
            unit="short",
            queries=(Query(expr=f"baton_worker_running_requests{{{MODEL}}}", legend="{{worker}}"),),
        ),
        Panel(
            title="Requests waiting",
            description="Requests queued in front of each engine's batch.",
            unit="short",
            queries=(Query(expr=f"baton_worker_waiting_requests{{{MODEL}}}", legend="{{worker}}"),),
        ),
        Panel(
            title="Prefill p99 per worker",
            description="99th percentile of a prompt's computation, first scheduling to first token.",
            unit="s",
            queries=(
                Query(
                    expr="histogram_quantile(0.99, sum by (le, worker) ("
                    + rate("baton_worker_prefill_seconds_bucket", MODEL)
                    + "))",
                    legend="{{worker}}",
                ),
            ),
        ),
        Panel(
            title="Tokens sampled per worker",
            description="Output tokens per second of each engine.",
            unit="suffix: tok/s",
            queries=(Query(expr=rate("baton_worker_output_tokens_total", MODEL), legend="{{worker}}"),),
        ),
    ),
)

CONTROL = Row(
    title="Control plane",
    panels=(
        Panel(
            title="Pools as routers see them",
            description="Workers in the routers' snapshots.",
            unit="short",
            queries=(
                Query(
                    expr=f"max by (model, role, state) (baton_workers{{{MODEL}}})",
                    legend="{{model}} {{role}} {{state}}",
                ),
            ),
            width=6,
        ),
        Panel(
            title="Role switches",
            description="Live role changes within the last interval.",
            unit="short",
            queries=(
                Query(
                    expr="sum by (from_role, to_role) ("
                    f"increase(baton_registry_role_switches_total{{{MODEL}}}[$__rate_interval]))",
                    legend="{{from_role}} to {{to_role}}",
                ),
            ),
            width=6,
        ),
        Panel(
            title="Heartbeats and dropped workers",
            description="Heartbeats the registry receives, and workers it drops, per second.",
            unit="cps",
            queries=(
                Query(expr=f"sum({rate('baton_registry_heartbeats_total', MODEL)})", legend="heartbeats"),
                Query(
                    expr=f"sum by (reason) ({rate('baton_registry_dropped_workers_total', MODEL)})",
                    legend="dropped: {{reason}}",
                ),
            ),
            width=6,
        ),
        Panel(
            title="Snapshot age",
            description="Time since each router heard from the registry; it goes on with the last snapshot.",
            unit="s",
            queries=(Query(expr="baton_snapshot_age_seconds", legend="{{instance}}"),),
            width=6,
        ),
    ),
)
