"""Writes the SLO dashboard, deploy/grafana/baton-slo.json, from the rows beside it.

    python -m deploy.grafana.slo_dashboard            write it
    python -m deploy.grafana.slo_dashboard --check    exit 1 if it is not what would be written

The only module that imports grafana-foundation-sdk, a dependency of development alone.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model

from deploy.grafana.cluster_rows import CONTROL, HANDOFF, WORKERS
from deploy.grafana.panels import Panel, Query
from deploy.grafana.planner_row import PLANNER
from deploy.grafana.request_rows import LATENCY, OVERVIEW, TRAFFIC, WATERFALL

JSON_PATH = Path(__file__).resolve().parent / "baton-slo.json"
DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
PANEL_HEIGHT = 8
ROWS = (OVERVIEW, LATENCY, TRAFFIC, WATERFALL, HANDOFF, WORKERS, CONTROL, PLANNER)


def render() -> str:
    """The dashboard's JSON."""
    board = (
        dashboard.Dashboard("Baton: SLO")
        .uid("baton-slo")
        .description("Latency against its targets, the paths requests take, and the workers behind them.")
        .tags(["baton", "llm"])
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("model", "Model"))
        .with_variable(_variable("tenant", "Tenant"))
    )
    panel_ids = count(1)
    for row in ROWS:
        board.with_row(dashboard.Row(row.title).id(next(panel_ids)))
        for panel in row.panels:
            build = _stat if panel.kind == "stat" else _timeseries
            board.with_panel(build(panel).id(next(panel_ids)))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _variable(label_name: str, label: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(label_name)
        .label(label)
        .datasource(DATASOURCE)
        .query(f"label_values(baton_requests_total, {label_name})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        # Everything, also series without the label: requests without a tenant have none.
        .all_value(".*")
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )


def _timeseries(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .min(0)
        .datasource(DATASOURCE)
        .height(PANEL_HEIGHT)
        .span(panel.width)
        .line_width(1)
        .fill_opacity(30 if panel.stacked else 0)
        .show_points(common_model.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_model.LegendDisplayMode.LIST)
            .placement(common_model.LegendPlacement.BOTTOM)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_model.TooltipDisplayMode.MULTI)
            .sort(common_model.SortOrder.DESCENDING)
        )
    )
    if panel.max_value is not None:
        built.max(panel.max_value)
    if panel.stacked:
        built.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
    for ref_id, query in zip("ABCDEFGH", panel.queries, strict=False):
        built.with_target(_target(query, ref_id))
        if query.dashed:
            built.override_by_query(ref_id, _dashed_line())
    return built


def _stat(panel: Panel) -> stat.Panel:
    (query,) = panel.queries
    return (
        stat.Panel()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .datasource(DATASOURCE)
        .height(PANEL_HEIGHT)
        .span(panel.width)
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .color_mode(common_model.BigValueColorMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_target(query, "A").instant())
    )


def _target(query: Query, ref_id: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref_id)


def _dashed_line() -> list[model.DynamicConfigValue]:
    return [
        model.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
        model.DynamicConfigValue("custom.fillOpacity", 0),
        model.DynamicConfigValue("custom.stacking", {"mode": "none", "group": "A"}),
        model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "red"}),
    ]


def main(arguments: list[str]) -> int:
    """Writes the dashboard, or compares it; returns the exit status."""
    text = render()
    if "--check" in arguments:
        if JSON_PATH.exists() and JSON_PATH.read_text() == text:
            return 0
        print(f"{JSON_PATH.name} is out of date: run python -m deploy.grafana.slo_dashboard", file=sys.stderr)
        return 1
    JSON_PATH.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
