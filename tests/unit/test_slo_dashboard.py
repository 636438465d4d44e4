"""The dashboard's layout, and that it asks only for metrics that exist. Prometheus proves the rest."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest

from deploy.grafana import slo_dashboard
from telemetry import metrics_docs
from telemetry.catalog import MetricInfo

DASHBOARD = json.loads(slo_dashboard.JSON_PATH.read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
METRICS = {metric.name: metric for catalog in metrics_docs.catalogs().values() for metric in catalog.metrics}
SAMPLE_NAMES = {
    f"{metric.name}{suffix}": metric
    for metric in METRICS.values()
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}


def test_the_written_dashboard_is_what_the_code_makes() -> None:
    assert slo_dashboard.main(["--check"]) == 0


def test_the_metrics_page_is_what_the_code_makes() -> None:
    assert metrics_docs.main(["--check"]) == 0


def test_every_panel_has_title_unit_description_and_named_series() -> None:
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        ref_ids = [target["refId"] for target in panel["targets"]]
        assert len(ref_ids) == len(set(ref_ids)), panel["title"]


def test_panels_are_named_once_and_have_ids_of_their_own() -> None:
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
    above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    return not (beside or above)


def test_panels_fill_the_page_and_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    assert not [pair for pair in combinations(places, 2) if overlap(*pair)]
    area = sum(place["w"] * place["h"] for place in places)
    assert area == 24 * max(place["y"] + place["h"] for place in places)


def test_panels_read_the_chosen_data_source() -> None:
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == [
        "datasource",
        "model",
        "tenant",
    ]


def sample_of(name: str) -> MetricInfo:
    assert name in SAMPLE_NAMES, f"no process exposes {name}"
    return SAMPLE_NAMES[name]


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_expressions_use_metrics_and_labels_that_exist(expr: str) -> None:
    selectors = re.findall(r"(baton_\w+)(?:\{([^}]*)\})?", expr)
    assert selectors
    available: set[str] = {"le", "instance"}
    for name, matchers in selectors:
        metric = sample_of(name)
        available.update(metric.labels)
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= set(metric.labels)
        if "tenant" in metric.labels:
            assert 'tenant=~"$tenant"' in matchers, f"{name} ignores the tenant chosen"
        if "model" in metric.labels:
            assert 'model=~"$model"' in matchers, f"{name} ignores the model chosen"
    grouped: list[Any] = re.findall(r"by \(([^)]*)\)", expr)
    assert {label.strip() for group in grouped for label in group.split(",")} <= available
