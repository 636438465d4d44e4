"""Worker counts change while requests run: through the planner's scaler, and through the configuration."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Set
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.counts_process import ANSWER
from tests.integration.server_process import HOST, ServerProcess, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
STEP_MS = 20
NUM_CPUS = 4
"""Room for three workers of one CPU beside the base's."""


class CountsCluster:
    """Two workers that always are there, and two of a shape that may have none to six."""

    def __init__(self, model_path: Path, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.config = _configuration(model_path, free_port())
        self.url = f"http://{HOST}:{self.config['router']['port']}"
        command = [sys.executable, "-m", "tests.integration.counts_process", str(self._write_config())]
        self.process = ServerProcess("the cluster", command, {"HF_HUB_OFFLINE": "1"}, run_dir / "counts.log")
        self._num_answers = 0
        self._answer(120.0)

    def say(self, line: str, timeout_s: float = 20.0) -> Any:
        self.process.send_line(line)
        return self._answer(timeout_s)

    def apply(self, change: Callable[[dict[str, Any]], None]) -> None:
        change(self.config)
        self.say(f"apply {self._write_config()}", 60.0)

    def _answer(self, timeout_s: float) -> Any:
        self._num_answers += 1
        self.process.wait_until(lambda: len(self._answers()) >= self._num_answers, timeout_s)
        return json.loads(self._answers()[-1] or "null")

    def _answers(self) -> list[str]:
        lines = self.process.log_tail(100_000).split("\n")[:-1]
        return [line.removeprefix(ANSWER) for line in lines if line.startswith(ANSWER)]

    def _write_config(self) -> Path:
        path = self._run_dir / "counts.yaml"
        path.write_text(json.dumps(self.config))
        return path

    def replicas(self) -> dict[str, set[int]]:
        """Process ids of Serve's replicas by deployment."""
        found: dict[str, set[int]] = {
            "Registry": set(),
            "Router": set(),
            "Worker-base": set(),
            "Worker-more": set(),
        }
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline()).replace("::", ":").split(":")
                if words[0] == "ray" and "ServeReplica" in words:
                    found.setdefault(words[words.index("ServeReplica") + 2].split(".")[0].strip(), set()).add(
                        process.pid
                    )
        return found

    async def workers(self) -> list[dict[str, Any]]:
        async with httpx.AsyncClient(timeout=10) as client:
            workers: list[dict[str, Any]] = (await client.get(f"{self.url}/baton/status")).json()["workers"]
            return workers

    async def wait_ready(
        self, num_more: int, timeout_s: float = 20.0, without: Set[str] = frozenset()
    ) -> None:
        async with asyncio.timeout(timeout_s):
            while True:
                workers = await self.workers()
                shapes = Counter(worker["shape"] for worker in workers)
                if shapes == Counter({"base": 2, "more": num_more}) and without.isdisjoint(
                    worker["worker_id"] for worker in workers
                ):
                    return
                await asyncio.sleep(0.1)

    async def complete(self, num_tokens: int, prompt: int) -> str:
        """Streams one answer to its end and returns its id."""
        body = {"model": "mock", "prompt": [1000 + prompt] * 20, "max_tokens": num_tokens, "stream": True}
        num_chunks, request_id, reason = 0, "", ""
        async with (
            httpx.AsyncClient(timeout=20) as client,
            client.stream(
                "POST", f"{self.url}/v1/completions", json={**body, "ignore_eos": True}
            ) as response,
        ):
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    num_chunks, request_id = num_chunks + 1, chunk["id"]
                    reason = chunk["choices"][0]["finish_reason"] or reason
        assert reason == "length", f"cut after {num_chunks} chunks"
        return request_id

    async def decoded_by(self, request_id: str) -> str:
        async with httpx.AsyncClient(timeout=10) as client:
            trace = (await client.get(f"{self.url}/baton/requests/{request_id}")).json()
        return str(trace["decode_worker"])

    @contextlib.asynccontextmanager
    async def under_load(self) -> AsyncIterator[None]:
        """Four clients, each sending one request after another; the first that fails fails the test."""
        ended = asyncio.Event()

        async def client(number: int) -> int:
            num_answers = 0
            while not ended.is_set():
                await self.complete(10, number)
                num_answers += 1
            return num_answers

        clients = [asyncio.create_task(client(number)) for number in range(4)]
        try:
            yield
        finally:
            ended.set()
            answers = await asyncio.gather(*clients)
        assert min(answers) > 0


def _configuration(model_path: Path, port: int) -> dict[str, Any]:
    mock = {
        "gpus_per_worker": 0,
        "engine": "mock",
        "mock": {"decode_step_ms": STEP_MS, "prefill_ms_per_1k_tokens": 10},
    }
    base = {"name": "base", "count": 2, "initial": {"prefill": 1, "decode": 1}, "cpus_per_worker": 0.1}
    more = {"name": "more", "count": 2, "min_count": 0, "max_count": 6, "roles": ["decode"]}
    more |= {"initial": {"decode": 2}, "cpus_per_worker": 1.0}
    slo = {"ttft_ms": 2000, "tpot_ms": 200}
    model = {"name": "mock", "path": str(model_path), "slo": slo, "shapes": [base | mock, more | mock]}
    return {
        "models": [model],
        "router": {"port": port, "policy": "round_robin"},
        "planner": {"gpu_budget": 7},
        "kv_transfer": {"buffer_device": "cpu", "lease_s": 5},
        "ray": {"num_cpus": NUM_CPUS},
        "startup_timeout_s": 120,
        "drain_timeout_s": 60,
    }


@pytest.fixture(scope="module")
def cluster(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountsCluster]:
    cluster = CountsCluster(model_path, tmp_path_factory.mktemp("counts"))
    try:
        yield cluster
    finally:
        cluster.process.stop(grace_s=40)


async def test_workers_come_and_go_under_load_without_a_failed_request(cluster: CountsCluster) -> None:
    assert cluster.say("wanted") == {"base": 2, "more": 2}
    before = cluster.replicas()
    async with cluster.under_load():
        await asyncio.to_thread(cluster.say, "ask more 3")
        await cluster.wait_ready(3)
        more = cluster.replicas()
        assert len(more["Worker-more"]) == 3
        assert before["Worker-more"] < more["Worker-more"]
        await asyncio.to_thread(cluster.say, "ask more 2")
        await cluster.wait_ready(2)
        await asyncio.to_thread(cluster.say, "ask more 0")  # the floor
        await cluster.wait_ready(0)
        await asyncio.to_thread(cluster.say, "ask more 2")
        await cluster.wait_ready(2)
    after = cluster.replicas()
    for deployment in ("Registry", "Router", "Worker-base"):
        assert after[deployment] == before[deployment]


async def test_a_worker_that_has_to_go_ends_its_streams_first(cluster: CountsCluster) -> None:
    streams = [asyncio.create_task(cluster.complete(300, 50 + number)) for number in range(6)]
    await asyncio.sleep(1)
    victims = {worker["worker_id"] for worker in await cluster.workers() if worker["shape"] == "more"}
    await asyncio.to_thread(cluster.say, "ask more 0")
    served = {await cluster.decoded_by(request_id) for request_id in await asyncio.gather(*streams)}
    assert len(victims & served) == 2, "no stream was on a worker that had to go"
    await cluster.wait_ready(0)


async def test_workers_that_cannot_start_hold_nobody_up(cluster: CountsCluster) -> None:
    assert "0 to 6 workers, not 7" in cluster.say("ask more 7")
    assert "8 GPUs in all; the budget is 7" in cluster.say("ask more 6")
    async with cluster.under_load():
        await asyncio.to_thread(cluster.say, "ask more 5")
        await cluster.wait_ready(3)
        await asyncio.to_thread(cluster.say, "lose")  # as with a planner that dies
        assert "is gone" in await asyncio.to_thread(cluster.say, "wanted")
        await asyncio.sleep(2)
        assert await asyncio.to_thread(cluster.say, "wanted") == {"base": 2, "more": 5}
        assert await asyncio.to_thread(cluster.say, "status") == "RUNNING"
        await cluster.wait_ready(3, timeout_s=10)
        await asyncio.to_thread(cluster.say, "ask more 2")
        await cluster.wait_ready(2)
    assert cluster.say("wanted") == {"base": 2, "more": 2}


async def test_streams_that_outlast_the_drain_go_on_elsewhere(cluster: CountsCluster) -> None:
    before = {worker["worker_id"] for worker in await cluster.workers()}
    await asyncio.to_thread(cluster.apply, lambda config: config.update(drain_timeout_s=2))
    await cluster.wait_ready(2, without=before)  # an update goes on rolling after it is applied
    streams = [asyncio.create_task(cluster.complete(600, 300 + number)) for number in range(6)]
    leaving = {worker["worker_id"] for worker in await cluster.workers() if worker["shape"] == "more"}
    async with asyncio.timeout(20):
        busy: set[str] = set()
        while not leaving & busy:
            busy = {worker["worker_id"] for worker in await cluster.workers() if worker["num_requests"]}
    await asyncio.to_thread(cluster.say, "ask more 0")
    await cluster.wait_ready(0)
    served = {await cluster.decoded_by(request_id) for request_id in await asyncio.gather(*streams)}
    assert not leaving & served, "a worker went on beyond its drain"
    await asyncio.to_thread(cluster.say, "ask more 2")
    await cluster.wait_ready(2)


async def test_a_changed_count_leaves_every_other_replica_alone(cluster: CountsCluster) -> None:
    before = cluster.replicas()
    async with cluster.under_load():
        await asyncio.to_thread(cluster.apply, lambda config: config["router"].update(replicas=2))
        two_routers = cluster.replicas()
        assert len(two_routers.pop("Router") - before["Router"]) == 1
        assert two_routers == {name: pids for name, pids in before.items() if name != "Router"}

        base = cluster.config["models"][0]["shapes"][0]
        changed = {"count": 3, "initial": {"prefill": 1, "decode": 2}}
        await asyncio.to_thread(cluster.apply, lambda _: base.update(changed))
        three_workers = cluster.replicas()
        assert len(three_workers.pop("Worker-base") - before["Worker-base"]) == 1
        assert three_workers.pop("Router") > before["Router"]
        assert three_workers == {name: pids for name, pids in before.items() if name in three_workers}
    roles = Counter(worker["role"] for worker in await cluster.workers() if worker["shape"] == "base")
    assert roles == {"prefill": 1, "decode": 2}
