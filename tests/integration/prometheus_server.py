"""A real Prometheus with the repository's configuration, and a client of its API."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
DASHBOARD = json.loads((ROOT / "deploy/grafana/baton-slo.json").read_text())
PROMETHEUS_DIR = ROOT / "deploy/prometheus"
START_TIMEOUT_S = 20
DATA_TIMEOUT_S = 45


def require_prometheus() -> None:
    """Skips the test where Prometheus is not installed; fails it in CI, where it has to be."""
    if all(shutil.which(tool) for tool in ("prometheus", "promtool")):
        return
    reason = "prometheus and promtool are not installed (Debian: apt-get install prometheus)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class Prometheus:
    """A client of Prometheus's HTTP API."""

    def __init__(self, address: str) -> None:
        self._http = httpx.Client(base_url=f"http://{address}", timeout=5)

    def get(self, path: str, **parameters: str) -> Any:
        response = self._http.get(path, params=parameters)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def query(
        self, expr: str, *, model: str = ".*", tenant: str = ".*"
    ) -> list[tuple[dict[str, str], float]]:
        """The series of an expression now, with Grafana's variables filled in."""
        filled = (
            expr.replace("$model", model)
            .replace("$tenant", tenant)
            .replace("$__rate_interval", "10s")
            .replace("$__range", "30s")
        )
        assert "$" not in filled, f"a variable this test does not know: {filled}"
        result = self.get("/api/v1/query", query=filled)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def series(self, expr: str, **variables: str) -> list[tuple[dict[str, str], float]]:
        """As ``query``, waiting until there are series and none of them is NaN or infinite."""
        deadline = time.monotonic() + DATA_TIMEOUT_S
        while True:
            found = self.query(expr, **variables)
            if found and all(math.isfinite(value) for _, value in found):
                return found
            assert time.monotonic() < deadline, f"no data within {DATA_TIMEOUT_S} s: {found}"
            time.sleep(0.5)

    def is_ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()


@contextmanager
def running_prometheus(discovery_address: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the repository's configuration, pointed at a router and scraping every second.

    Args:
        discovery_address: host:port of the router that answers service discovery.
        folder: where it keeps its files.
    """
    text = (PROMETHEUS_DIR / "prometheus.yml").read_text().replace("ROUTER", discovery_address)
    config = yaml.safe_load(text)
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS_DIR / "alerts.yml", folder)
    with socket.socket() as free:
        free.bind((HOST, 0))
        address = f"{HOST}:{free.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    log_path = folder / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    client = Prometheus(address)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not client.is_ready():
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline, log_path.read_text()
            time.sleep(0.1)
        yield client
    finally:
        client.close()
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
