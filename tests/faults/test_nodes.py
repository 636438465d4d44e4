"""Rows 24 and 25, and a drained node.

A node's raylet is killed; a node is drained; the head's GCS is killed, with and without a store behind it.
The nodes are network namespaces with an address each. The head has no room for workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import time
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults import netns
from tests.faults.load import Fate, Load
from tests.faults.node_cluster import GCS_TIMEOUT_S, node_cluster
from tests.faults.processes import describe
from tests.faults.ray_nodes import BRIDGE_HOST, RayNode
from tests.faults.record import FaultReport
from tests.faults.references import LONG_ANSWER, MIXED, References

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(700),
    pytest.mark.skipif(netns.why_not() is not None, reason=str(netns.why_not())),
]

ONE_OF_EACH = {"prefill": 1, "decode": 1}
REDIS_PORT = 6390
GCS_OUT_S = 8.0
DRAINED_WITHIN_S = 240
REPLACED_WITHIN_S = 240


def fates(load: Load, since_s: float) -> dict[str, int]:
    return {
        str(fate): load.count(fate, since_s) for fate in (Fate.RIGHT, Fate.WRONG, Fate.FAILED, Fate.REFUSED)
    }


def troubles(load: Load) -> list[str]:
    bad = (Fate.WRONG, Fate.FAILED, Fate.REFUSED)
    return [str(outcome) for outcome in load.outcomes if outcome.fate in bad][:10]


def longest_silence_s(load: Load, since_s: float) -> float:
    right = [each for each in load.since(since_s) if each.fate is Fate.RIGHT]
    return round(max((each.longest_silence_s(since_s) for each in right), default=0.0), 2)


def counted(load: Load, since_s: float) -> dict[str, float]:
    """As the report has it."""
    served = fates(load, since_s)
    counts = {"served": served["right"], **{name: served[name] for name in ("failed", "refused", "wrong")}}
    return {**counts, "silence_max_s": longest_silence_s(load, since_s)}


async def outlived_by(node: RayNode, within_s: float) -> tuple[list[psutil.Process], float]:
    """What is left of a node whose raylet is gone, and after how long it was no less."""
    since_s = last_s = time.monotonic()
    left = await asyncio.to_thread(node.processes)
    while left and time.monotonic() < since_s + within_s:
        await asyncio.sleep(0.5)
        now_left = await asyncio.to_thread(node.processes)
        if len(now_left) != len(left):
            left, last_s = now_left, time.monotonic()
    return left, round(last_s - since_s, 1)


def of_baton(processes: list[psutil.Process]) -> list[str]:
    """Replicas, engines and HAProxies; of Ray's own, ``log_monitor`` outlives a raylet for a while."""
    mine = ("ServeReplica", "EngineCore", "haproxy")
    return [title for title in map(describe, processes) if any(name in title for name in mine)]


@pytest.mark.asyncio
async def test_a_killed_raylet_takes_its_workers_and_no_stream(
    fault_model: Path, references: References, tmp_path: Path, fault_report: FaultReport
) -> None:
    initial = {"prefill": 1, "decode": 2}
    with node_cluster(fault_model, tmp_path, {}, num_nodes=2, initial=initial) as cluster:
        nodes = cluster.nodes.nodes
        victim = min(nodes, key=lambda node: len(node.replicas("Router")))
        spared = not victim.replicas("Router")
        for node in (victim, *(each for each in nodes if each is not victim)):
            await asyncio.to_thread(cluster.give_decode_to, node)
        hit = {w["worker_id"] for w in cluster.ready() if cluster.node_of(w) is victim}
        load = Load(cluster.url, references, clients=4, kinds=(LONG_ANSWER, MIXED), seed="raylet")
        async with load:
            await load.wait_until("streams run", lambda: len(load.streaming(5)) >= 3)
            killed_s = time.monotonic()
            victim.system("raylet").kill()
            left, ended_s = await outlived_by(victim, within_s=15)
            print(
                f"of the node's processes the last ended after {ended_s} s; left: {list(map(describe, left))}"
            )
            whole_s = ended_s + await asyncio.to_thread(cluster.wait_pool, REPLACED_WITHIN_S, hit)
            await asyncio.sleep(1)
        served = fates(load, killed_s)
        print(served, f"whole after {whole_s:.1f} s, silence {longest_silence_s(load, killed_s)} s")
        leaked = await asyncio.to_thread(cluster.leaked_blocks, 10)
        fault_report.record(
            row=24,
            what="SIGKILL to a raylet",
            **counted(load, killed_s),
            whole_s=round(time.monotonic() - killed_s, 1),
            leaked=len(leaked),
            outlived=len(left),
        )
        assert served["wrong"] == 0, troubles(load)
        if spared:  # streams of a router that dies are cut
            assert served["failed"] == 0, troubles(load)
        assert served["right"] > 0
        assert leaked == {}
        assert of_baton(left) == []


@pytest.mark.asyncio
async def test_a_node_that_drains_hands_all_over_and_cuts_no_stream(
    fault_model: Path, references: References, tmp_path: Path, fault_report: FaultReport
) -> None:
    initial = {"prefill": 1, "decode": 2}
    with node_cluster(fault_model, tmp_path, {}, num_nodes=2, initial=initial) as cluster:
        leaving = max(cluster.nodes.nodes, key=lambda node: len(node.replicas("Worker-cpu")))
        for node in (leaving, *(each for each in cluster.nodes.nodes if each is not leaving)):
            await asyncio.to_thread(cluster.give_decode_to, node)
        moved = {w["worker_id"] for w in cluster.ready() if cluster.node_of(w) is leaving}
        load = Load(cluster.url, references, clients=4, kinds=(LONG_ANSWER, MIXED), seed="drain")
        async with load:
            await load.wait_until("streams run", lambda: len(load.streaming(5)) >= 3)
            began_s = time.monotonic()
            await asyncio.to_thread(cluster.nodes.drain, leaving, DRAINED_WITHIN_S)
            await asyncio.to_thread(cluster.wait_pool, DRAINED_WITHIN_S, moved)
            while replicas := await asyncio.to_thread(leaving.replicas, ""):
                assert time.monotonic() < began_s + DRAINED_WITHIN_S, list(map(describe, replicas))
                await asyncio.sleep(0.5)
            whole_s = time.monotonic() - began_s
            await asyncio.sleep(1)
        served = fates(load, began_s)
        print(served, f"empty after {whole_s:.1f} s, silence {longest_silence_s(load, began_s)} s")
        leaked = await asyncio.to_thread(cluster.leaked_blocks, 10)
        fault_report.record(
            row=20,
            what="a node is drained",
            **counted(load, began_s),
            whole_s=round(whole_s, 1),
            leaked=len(leaked),
        )
        assert served["wrong"] == served["failed"] == served["refused"] == 0, troubles(load)
        assert leaked == {}


@pytest.mark.asyncio
async def test_streams_go_on_without_a_gcs_until_raylets_give_up(
    fault_model: Path, references: References, tmp_path: Path, fault_report: FaultReport
) -> None:
    with node_cluster(fault_model, tmp_path, {}, num_nodes=1, initial=ONE_OF_EACH) as cluster:
        (node,), head = cluster.nodes.nodes, cluster.nodes.head
        load = Load(cluster.url, references, clients=4, kinds=(LONG_ANSWER, MIXED), seed="gcs")
        async with load:
            await load.wait_until("streams run", lambda: len(load.streaming(5)) >= 3)
            killed_s = time.monotonic()
            running = set(load.streaming(5))
            head.system("gcs_server").kill()
            await load.wait_until(
                "new requests are answered",
                lambda: any(each.began_s > killed_s for each in load.since(killed_s)),
            )
            await asyncio.sleep(GCS_OUT_S)
            await load.end()
        served = fates(load, killed_s)
        print(served, "silence", longest_silence_s(load, killed_s), "running then", len(running))
        assert served["wrong"] == served["failed"] == served["refused"] == 0, troubles(load)
        assert all(each.fate is Fate.RIGHT for each in running)
        assert await asyncio.to_thread(cluster.leaked_blocks, 5) == {}

        left, ended_s = await outlived_by(node, within_s=GCS_TIMEOUT_S + 30 - (time.monotonic() - killed_s))
        gone_s = round(time.monotonic() - killed_s, 1)
        print(f"after {gone_s} s, {ended_s} s after the load: left {list(map(describe, left))}")
        fault_report.record(
            row=25,
            what="SIGKILL to the GCS, nothing behind it",
            **counted(load, killed_s),
            outlived=len(left),
        )
        assert of_baton(left) == []


@contextlib.contextmanager
def gcs_store(name: str, run_dir: Path) -> Iterator[dict[str, str]]:
    """Something that keeps the GCS's state: what Ray has to be told of it."""
    if name == "rocksdb":
        yield {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(run_dir / "gcs")}
        return
    command = ["redis-server", "--port", str(REDIS_PORT), "--bind", "0.0.0.0"]
    with (run_dir / "redis.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--protected-mode", "no", "--save", ""], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield {"RAY_REDIS_ADDRESS": f"{BRIDGE_HOST}:{REDIS_PORT}"}
    finally:
        process.kill()
        process.wait(10)


STORES = [
    "rocksdb",
    pytest.param(
        "redis",
        marks=pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server"),
    ),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("store", STORES)
async def test_a_gcs_that_comes_back_with_its_state_governs_the_same_cluster(
    store: str, fault_model: Path, references: References, tmp_path: Path, fault_report: FaultReport
) -> None:
    with (
        gcs_store(store, tmp_path) as environment,
        node_cluster(fault_model, tmp_path, environment, num_nodes=1, initial=ONE_OF_EACH) as cluster,
    ):
        (node,) = cluster.nodes.nodes
        load = Load(cluster.url, references, clients=4, kinds=(LONG_ANSWER, MIXED), seed=store)
        async with load:
            await load.wait_until("streams run", lambda: len(load.streaming(5)) >= 3)
            before = {process.pid for process in node.processes()}
            killed_s = time.monotonic()
            await restart_gcs(cluster.nodes.head)
            await asyncio.sleep(GCS_TIMEOUT_S)  # who had given up would be gone by then
            assert before <= {process.pid for process in node.processes()}
            worker = next(each for each in cluster.ready() if each["role"] == "prefill")
            worker_died_s = time.monotonic()
            kill_replica(node, worker)
            await asyncio.to_thread(cluster.wait_pool, REPLACED_WITHIN_S, {worker["worker_id"]})
            replaced_after_s = time.monotonic() - worker_died_s
        served, silence_s = fates(load, killed_s), longest_silence_s(load, killed_s)
        print(served, f"silence {silence_s} s, a worker replaced after {replaced_after_s:.1f} s")
        leaked = await asyncio.to_thread(cluster.leaked_blocks, 10)
        fault_report.record(
            row=25,
            what=f"SIGKILL to the GCS, back from {store} after {GCS_OUT_S:g} s, then a worker killed",
            **counted(load, killed_s),
            whole_s=round(replaced_after_s, 1),
            leaked=len(leaked),
        )
        assert served["wrong"] == served["failed"] == served["refused"] == 0, troubles(load)
        assert leaked == {}


async def restart_gcs(head: RayNode) -> None:
    """Kills the head's GCS, and starts it again a while later, as whoever supervises it would."""
    gcs = head.system("gcs_server")
    command, environment = gcs.cmdline(), gcs.environ()
    gcs.kill()
    await asyncio.sleep(GCS_OUT_S)
    await asyncio.create_subprocess_exec(
        *head.command(*command), env=environment, stdout=DEVNULL, stderr=DEVNULL
    )


def kill_replica(node: RayNode, worker: dict[str, Any]) -> None:
    port = worker["address"].rpartition(":")[2]
    # psutil knows no connections but those of its own namespace.
    listening = node.run("ss", "--listening", "--tcp", "--processes", f"sport = :{port}")
    (pid,) = set(re.findall(r"pid=(\d+)", listening))
    psutil.Process(int(pid)).kill()
