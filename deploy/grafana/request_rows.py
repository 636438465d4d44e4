"""Rows of the SLO dashboard about requests: attainment, latency, paths, waterfall."""

from __future__ import annotations

from deploy.grafana.panels import MODEL, REQUESTS, Panel, Query, Row, rate

QUANTILES = (0.5, 0.9, 0.99)


def share_met(window: str) -> str:
    """Attainment: requests that met their SLO over all offered ones."""
    met = rate("baton_slo_requests_total", f'{REQUESTS}, result="met"', window)
    return f"sum({met}) / sum({rate('baton_slo_requests_total', REQUESTS, window)})"


def goodput(window: str) -> str:
    """Requests per second that met their SLO."""
    met = rate("baton_slo_requests_total", f'{REQUESTS}, result="met"', window)
    return f"sum({met})"


def _latency(title: str, metric: str, description: str, slo: str | None = None) -> Panel:
    queries = [
        Query(
            expr=f"histogram_quantile({q}, sum by (le) ({rate(f'{metric}_bucket', REQUESTS)}))",
            legend=f"p{q * 100:g}",
        )
        for q in QUANTILES
    ]
    if slo is not None:
        queries.append(
            Query(
                expr=f'max by (model) (baton_slo_target_seconds{{{MODEL}, slo="{slo}"}})',
                legend="SLO {{model}}",
                dashed=True,
            )
        )
    return Panel(title=title, description=description, unit="s", queries=tuple(queries), width=6)


def _per_second_by(label: str, metric: str) -> Query:
    return Query(expr=f"sum by ({label}) ({rate(metric, REQUESTS)})", legend=f"{{{{{label}}}}}")


OVERVIEW = Row(
    title="SLO",
    panels=(
        Panel(
            title="Attainment",
            description="Share of all offered requests that met both targets; rejected and failed miss.",
            unit="percentunit",
            queries=(Query(expr=share_met("$__range"), legend="attainment"),),
            kind="stat",
            width=4,
        ),
        Panel(
            title="Goodput",
            description="Requests per second that met both targets.",
            unit="reqps",
            queries=(Query(expr=goodput("$__range"), legend="goodput"),),
            kind="stat",
            width=4,
        ),
        Panel(
            title="Attainment over time",
            description="Share of offered requests that met both targets.",
            unit="percentunit",
            queries=(Query(expr=share_met("$__rate_interval"), legend="attainment"),),
            max_value=1,
        ),
        Panel(
            title="SLO results",
            description="Offered requests per second: the goodput, and what the rest missed.",
            unit="reqps",
            queries=(_per_second_by("result", "baton_slo_requests_total"),),
            stacked=True,
        ),
    ),
)

LATENCY = Row(
    title="Latency",
    panels=(
        _latency("TTFT", "baton_ttft_seconds", "Time from a request's arrival to its first token.", "ttft"),
        _latency("TPOT", "baton_tpot_seconds", "Mean time per output token after the first.", "tpot"),
        _latency(
            "ITL", "baton_itl_seconds", "Gap between two arrivals of tokens; TPOT's target for scale.", "tpot"
        ),
        _latency("E2E", "baton_e2e_seconds", "Time from a request's arrival to its last token."),
    ),
)

TRAFFIC = Row(
    title="Requests",
    panels=(
        Panel(
            title="Requests by path",
            description="Where prompts were prefilled: on a prefill worker (remote, remote_early,"
            " prefill_only), on the decode worker (local), or nowhere (none).",
            unit="reqps",
            queries=(_per_second_by("path", "baton_requests_total"),),
            stacked=True,
            width=6,
        ),
        Panel(
            title="Requests by outcome",
            description="How requests ended for their clients.",
            unit="reqps",
            queries=(_per_second_by("outcome", "baton_requests_total"),),
            stacked=True,
            width=6,
        ),
        Panel(
            title="Requests in flight",
            description="Requests that arrived and have not ended.",
            unit="short",
            queries=(
                Query(expr=f"sum by (model) (baton_inflight_requests{{{REQUESTS}}})", legend="{{model}}"),
            ),
            width=6,
        ),
        Panel(
            title="Tokens",
            description="Prompt tokens of placed requests, those found in prefix caches, and output tokens.",
            unit="suffix: tok/s",
            queries=tuple(
                Query(expr=f"sum({rate(metric, REQUESTS)})", legend=legend)
                for metric, legend in (
                    ("baton_prompt_tokens_total", "prompt"),
                    ("baton_cached_prompt_tokens_total", "prompt, cached"),
                    ("baton_output_tokens_total", "output"),
                )
            ),
            width=6,
        ),
    ),
)

WATERFALL = Row(
    title="Where the time goes",
    panels=(
        Panel(
            title="Waterfall up to the first decode step",
            description="Mean seconds per whole answer in each leg before steady decoding. A request"
            " without a leg counts as zero there, so the stack's height is that of the mean request.",
            unit="s",
            queries=(
                Query(
                    expr=(
                        "sum by (leg) ("
                        + rate("baton_leg_seconds_sum", f'{REQUESTS}, leg!="decode"')
                        + f") / on() group_left() sum({rate('baton_e2e_seconds_count', REQUESTS)})"
                    ),
                    legend="{{leg}}",
                ),
            ),
            stacked=True,
            width=12,
        ),
        Panel(
            title="p99 per leg",
            description="99th percentile of each leg, over the requests that have it.",
            unit="s",
            queries=(
                Query(
                    expr="histogram_quantile(0.99, sum by (le, leg) ("
                    + rate("baton_leg_seconds_bucket", REQUESTS)
                    + "))",
                    legend="{{leg}}",
                ),
            ),
            width=12,
        ),
    ),
)
