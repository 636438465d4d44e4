"""The row of the SLO dashboard about the planner."""

from __future__ import annotations

from deploy.grafana.panels import MODEL, Panel, Query, Row, rate

PLANNER = Row(
    title="Planner",
    panels=(
        Panel(
            title="Split",
            description="Workers by the role they report; as dashed lines, what the planner wants.",
            unit="short",
            queries=(
                Query(expr=f"sum by (role) (baton_planner_present_workers{{{MODEL}}})", legend="{{role}}"),
                Query(
                    expr=f"sum by (role) (baton_planner_wanted_workers{{{MODEL}}})",
                    legend="{{role}} wanted",
                    dashed=True,
                ),
            ),
            width=6,
        ),
        Panel(
            title="Predicted attainment",
            description="Share of requests within both targets, with the split as it was and as decided.",
            unit="percentunit",
            queries=(
                Query(expr=f"baton_planner_predicted_attainment{{{MODEL}}}", legend="{{model}} {{split}}"),
            ),
            max_value=1,
            width=6,
        ),
        Panel(
            title="Load seen and forecast",
            description="Requests per second that decisions were made from.",
            unit="reqps",
            queries=(Query(expr=f'baton_planner_input{{{MODEL}, input=~".*_rps"}}', legend="{{input}}"),),
            width=6,
        ),
        Panel(
            title="Decisions",
            description="Decisions per second by verdict; blind ones knew too little to judge.",
            unit="cps",
            queries=(
                Query(
                    expr=f"sum by (verdict) ({rate('baton_planner_decisions_total', MODEL)})",
                    legend="{{verdict}}",
                ),
            ),
            stacked=True,
            width=6,
        ),
        Panel(
            title="Role changes ordered",
            description="Workers told to take another role within the last interval.",
            unit="short",
            queries=(
                Query(
                    expr="sum by (from_role, to_role) ("
                    f"increase(baton_planner_role_changes_total{{{MODEL}}}[$__rate_interval]))",
                    legend="{{from_role}} to {{to_role}}",
                ),
            ),
            width=6,
        ),
        Panel(
            title="What the planner tried in vain",
            description="Per second; more than a few mean that it holds. BatonPlannerHolds alerts on it.",
            unit="cps",
            queries=(
                Query(
                    expr=f"sum by (doing) ({rate('baton_planner_failures_total', MODEL)})", legend="{{doing}}"
                ),
                Query(
                    expr=f"max(baton_planner_observation_age_seconds{{{MODEL}}})",
                    legend="seconds since it saw the cluster",
                    dashed=True,
                ),
            ),
            width=6,
        ),
        Panel(
            title="Decision CPU p99",
            description="99th percentile of the CPU time of one decision.",
            unit="s",
            queries=(
                Query(
                    expr="histogram_quantile(0.99, sum by (le) ("
                    + rate("baton_planner_decision_cpu_seconds_bucket", MODEL)
                    + "))",
                    legend="p99",
                ),
            ),
            width=6,
        ),
        Panel(
            title="Step times over the profile's",
            description="As learned from the workers; far from 1, the profile is another machine's.",
            unit="short",
            queries=(
                Query(
                    expr=f"baton_planner_step_time_factor{{{MODEL}}}",
                    legend="{{shape}} {{role}}: {{phase}}",
                ),
            ),
            width=6,
        ),
    ),
)
