"""Several routers: streams of one live through the start, stop and death of another."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration.routers_process import READY
from tests.integration.server_process import HOST, ServerProcess, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
STEP_MS = 100
NUM_STREAMS = 8


class RouterCluster:
    """A cluster of mock workers with a changing number of routers."""

    def __init__(self, model_path: Path, run_dir: Path) -> None:
        self.port = free_port()
        config = run_dir / "routers.yaml"
        config.write_text(json.dumps(_configuration(model_path, self.port)))
        command = [sys.executable, "-m", "tests.integration.routers_process", str(config)]
        self.process = ServerProcess("the cluster", command, {"HF_HUB_OFFLINE": "1"}, run_dir / "routers.log")
        self._num_ready = 0
        self._wait_ready()

    def _wait_ready(self, timeout_s: float = 120.0) -> None:
        self._num_ready += 1
        self.process.wait_until(lambda: self.process.log_tail().count(READY) >= self._num_ready, timeout_s)

    def scale(self, num_routers: int) -> None:
        self.process.send_line(str(num_routers))
        self._wait_ready()

    def router_processes(self) -> list[psutil.Process]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in family if ":Router" in " ".join(child.cmdline())]

    async def stream(self, num_tokens: int, arrivals: list[float]) -> None:
        """Streams one answer; raises if it is cut."""
        body = {
            "model": "mock",
            "prompt": [1000 + len(arrivals)] * 20,
            "max_tokens": num_tokens,
            "stream": True,
            "ignore_eos": True,
        }
        timeout = httpx.Timeout(20.0)
        async with (
            httpx.AsyncClient(timeout=timeout) as client,
            client.stream("POST", f"http://{HOST}:{self.port}/v1/completions", json=body) as response,
        ):
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    arrivals.append(time.monotonic())
        raise ConnectionError("the stream ended without [DONE]")


@pytest.fixture(scope="module")
def routers(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterCluster]:
    cluster = RouterCluster(model_path, tmp_path_factory.mktemp("routers"))
    try:
        yield cluster
    finally:
        cluster.process.stop(grace_s=40)


def _configuration(model_path: Path, port: int) -> dict:
    return {
        "models": [
            {
                "name": "mock",
                "path": str(model_path),
                "slo": {"ttft_ms": 2000, "tpot_ms": 200},
                "shapes": [
                    {
                        "name": "mock",
                        "count": 2,
                        "initial": {"prefill": 1, "decode": 1},
                        "gpus_per_worker": 0,
                        "cpus_per_worker": 0.1,
                        "engine": "mock",
                        "mock": {"decode_step_ms": STEP_MS, "prefill_ms_per_1k_tokens": 10},
                    }
                ],
            }
        ],
        "router": {"port": port, "replicas": 2},
        "kv_transfer": {"buffer_device": "cpu", "lease_s": 5},
        "startup_timeout_s": 120,
        "drain_timeout_s": 700,
    }


def cut_among(streams: list[asyncio.Task[None]]) -> list[BaseException]:
    return [error for stream in streams if stream.done() and (error := stream.exception())]


@pytest.mark.parametrize("duration_s", [50, pytest.param(600, marks=pytest.mark.endurance)])
async def test_streams_live_through_another_routers_start_stop_and_kill(
    routers: RouterCluster, duration_s: int
) -> None:
    num_tokens = duration_s * 1000 // STEP_MS
    arrivals: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
    streams = []
    for each in arrivals:  # one after another: HAProxy hears of a new router within seconds
        streams.append(asyncio.create_task(routers.stream(num_tokens, each)))
        await asyncio.sleep(0.5)
    assert cut_among(streams) == []

    victim = routers.router_processes()[0]
    victim.kill()
    await asyncio.sleep(3)
    cut = [stream for stream in streams if stream.done()]
    assert len(cut_among(streams)) == len(cut)
    assert len(cut) < NUM_STREAMS, "every stream died with one router"
    async with asyncio.timeout(15):  # new requests are served at once or nearly so
        while True:
            try:
                await routers.stream(3, [])
                break
            except (httpx.HTTPError, ConnectionError, AssertionError):
                await asyncio.sleep(0.5)

    await asyncio.to_thread(routers.scale, 3)  # a router starts
    assert len(cut_among(streams)) == len(cut)
    await asyncio.to_thread(routers.scale, 1)  # two stop: they finish their streams first
    for stream in streams:
        if stream not in cut:
            await stream
    whole = [each for each, stream in zip(arrivals, streams, strict=True) if stream not in cut]
    assert all(len(each) >= num_tokens - 1 for each in whole)
