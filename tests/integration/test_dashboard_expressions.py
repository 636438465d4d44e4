"""The dashboard, the alerts and the scrape configuration, on a real Prometheus under simulated load."""

from __future__ import annotations

import re
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.prometheus_server import (
    DASHBOARD,
    ROOT,
    Prometheus,
    require_prometheus,
    running_prometheus,
)
from tests.integration.simulated_load import ENDINGS, LEG_S, MODEL, TENANTS, running_cluster

pytestmark = pytest.mark.prometheus


def dashboard_targets() -> list[Any]:
    """Every query of the dashboard, named by panel and series."""
    return [
        pytest.param(target["expr"], id=f"{panel['title']}: {target['legendFormat']}")
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    ]


@pytest.fixture(scope="module", autouse=True)
def prometheus_tools() -> None:
    require_prometheus()


@pytest.fixture(scope="module")
def cluster_addresses() -> Iterator[tuple[list[str], str]]:
    """The endpoints of a cluster under load, and where its service discovery answers."""
    with running_cluster() as (cluster, discovery_address):
        yield cluster.addresses, discovery_address


@pytest.fixture(scope="module")
def prometheus(
    cluster_addresses: tuple[list[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    with running_prometheus(cluster_addresses[1], tmp_path_factory.mktemp("prometheus")) as client:
        yield client


@pytest.mark.parametrize("expr", dashboard_targets())
def test_every_dashboard_expression_returns_data(prometheus: Prometheus, expr: str) -> None:
    assert prometheus.series(expr)


@pytest.mark.parametrize("expr", dashboard_targets())
def test_every_dashboard_expression_returns_data_of_one_model_and_tenant(
    prometheus: Prometheus, expr: str
) -> None:
    assert prometheus.series(expr, model=MODEL, tenant="acme")


def test_the_dashboards_variables_list_models_and_tenants(prometheus: Prometheus) -> None:
    prometheus.series("baton_requests_total")
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "datasource":
            continue
        asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
        assert asked is not None
        values = prometheus.get(f"/api/v1/label/{asked[2]}/values", **{"match[]": asked[1]})
        assert (
            values == {"model": [MODEL], "tenant": [tenant for tenant in TENANTS if tenant]}[variable["name"]]
        )


def expression_of(title: str) -> str:
    (panel,) = [panel for panel in DASHBOARD["panels"] if panel["title"] == title]
    return str(panel["targets"][0]["expr"])


def test_attainment_and_the_waterfall_show_what_was_simulated(prometheus: Prometheus) -> None:
    ((_, attainment),) = prometheus.series(expression_of("Attainment over time"))
    assert attainment == pytest.approx(4 / len(ENDINGS), abs=0.02)

    legs = prometheus.series(expression_of("Waterfall up to the first decode step"))
    # Seven of eight requests were placed and have legs, six of eight ended in a whole answer.
    expected_s = {leg: seconds * 7 / 6 for leg, seconds in LEG_S.items() if leg != "decode"}
    assert {labels["leg"]: value for labels, value in legs} == pytest.approx(expected_s, rel=0.05)


def test_latency_quantiles_and_kv_use_show_what_was_simulated(prometheus: Prometheus) -> None:
    ((_, ttft_p50_s),) = prometheus.series(expression_of("TTFT"))
    assert 0.15 <= ttft_p50_s <= 0.2
    use = prometheus.series(expression_of("KV use"))
    assert {labels["worker"]: value for labels, value in use} == {"prefill-0": 0.3, "decode-0": 0.3}


def test_service_discovery_finds_every_process(prometheus: Prometheus) -> None:
    prometheus.series("up == 1")
    targets = prometheus.get("/api/v1/targets", state="active")["activeTargets"]
    assert sorted(target["labels"]["process"] for target in targets) == [
        "planner",
        "registry",
        "router",
        "worker",
        "worker",
    ]
    assert not [label for label in prometheus.get("/api/v1/labels") if label.startswith("exported_")]


def test_every_rule_evaluates(prometheus: Prometheus) -> None:
    prometheus.series("model:baton_slo_misses:ratio_rate5m")
    rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert len(rules) == 10
    assert {rule["health"] for rule in rules} == {"ok"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "deploy/prometheus/prometheus.yml"),
        ("check", "rules", "deploy/prometheus/alerts.yml"),
        ("test", "rules", "tests/integration/prometheus_alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong_with_any_endpoints_metrics(
    cluster_addresses: tuple[list[str], str],
) -> None:
    for address in cluster_addresses[0]:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
            exposition = response.read()
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=exposition, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
