"""The dashboard on a real Prometheus that scrapes the real cluster under load."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator

import pytest

from tests.integration.prometheus_server import (
    DASHBOARD,
    Prometheus,
    require_prometheus,
    running_prometheus,
)
from tests.integration.served import ServedByBaton

pytestmark = [pytest.mark.engine, pytest.mark.prometheus]
ONLY_AFTER_TROUBLE = (
    "baton_prefill_fallbacks_total",
    "baton_kv_recomputes_total",
    "baton_registry_dropped_workers_total",
)
"""Counters that have no series until something has gone wrong."""
ONLY_WITH_A_PROFILE = ("baton_planner_step_time_factor",)


@pytest.fixture(scope="module")
def prometheus(cluster: ServedByBaton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    require_prometheus()
    address = cluster.url.removeprefix("http://")
    with running_prometheus(address, tmp_path_factory.mktemp("prometheus")) as client:
        yield client


async def test_every_panel_shows_the_running_cluster(cluster: ServedByBaton, prometheus: Prometheus) -> None:
    await asyncio.to_thread(prometheus.series, "up")
    bodies = [
        {"prompt": [7, *range(20, 60 + number % 50)], "max_tokens": 12, "stream": number % 2 == 0}
        for number in range(300)
    ]
    load = asyncio.create_task(cluster.post_all("/v1/completions", bodies, at_once=4))
    missing = {
        f"{panel['title']}: {target['expr']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
        if not any(name in target["expr"] for name in (*ONLY_AFTER_TROUBLE, *ONLY_WITH_A_PROFILE))
    }
    while missing and not load.done():
        for title, expr in list(missing.items()):
            found = await asyncio.to_thread(prometheus.query, expr)
            if any(math.isfinite(value) for _, value in found):
                del missing[title]
        await asyncio.sleep(0.5)
    assert {answer.status for answer in await load} == {200}
    assert not missing


def test_every_process_is_scraped(prometheus: Prometheus) -> None:
    up = prometheus.series("up")
    processes = sorted(labels["process"] for labels, value in up if value == 1)
    assert processes == ["planner", "registry", "router", "worker", "worker"]


def test_the_bytes_on_the_dashboard_are_those_of_the_traces(
    cluster: ServedByBaton, prometheus: Prometheus
) -> None:
    total = "sum(baton_kv_transfer_bytes_total)"
    before = -1.0
    while before != (now := sum(value for _, value in prometheus.query(total))):
        before = now  # until what was pulled before this test has been scraped
        time.sleep(2.5)
    answer = cluster.post("/v1/completions", {"prompt": list(range(500, 900)), "max_tokens": 4})
    num_bytes = cluster.trace(answer.id)["kv_bytes"]
    assert num_bytes > 0
    assert prometheus.series(f"{total} == {before + num_bytes}")
