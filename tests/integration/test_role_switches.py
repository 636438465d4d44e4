"""Live role switches on a running cluster, and the planner beside it: watched, killed, restarted."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.planned_cluster import PlannedCluster, eventually, planned_cluster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
NUM_STREAMS = 12
STREAM_TOKENS = 120
PROMPT_TOKENS = 200


@pytest.fixture(scope="module")
def planned(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlannedCluster]:
    policy = {"policy": "round_robin"}  # everybody gets requests
    with planned_cluster(
        model_path, tmp_path_factory.mktemp("planned"), mode="advise", router=policy
    ) as cluster:
        yield cluster


# ---------------------------------------------------------------------------------------- load


def body(number: int, max_tokens: int) -> dict[str, Any]:
    prompt = [1000 + number % 1000] * PROMPT_TOKENS
    return {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


async def first_by_each(
    cluster: PlannedCluster, leg: str, workers: set[str], since_s: float, within_s: float
) -> dict[str, tuple[float, float]]:
    """Sends short requests until each worker has had this leg of one.

    Returns:
        By worker, seconds from ``since_s`` to the first such answer's end, and how long that request took.
    """
    found: dict[str, tuple[float, float]] = {}
    ended: list[tuple[str, float, float]] = []
    limits = httpx.Limits(max_connections=8)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=30.0, limits=limits) as client:

        async def ask(number: int) -> None:
            began_s = time.monotonic()
            answer = await cluster.send(client, "/v1/completions", body(number, 2))
            assert answer.status == 200
            now_s = time.monotonic()
            ended.append((answer.id, now_s - since_s, now_s - began_s))

        pending: set[asyncio.Task[None]] = set()
        number = 0
        while set(found) != workers:
            assert time.monotonic() < since_s + within_s, f"{leg} on {workers}: only {found}"
            while len(pending) < 8:
                number += 1
                pending.add(asyncio.create_task(ask(number)))
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            while ended:
                request_id, after_s, took_s = ended.pop(0)
                worker_id = (await asyncio.to_thread(cluster.trace, request_id))[leg]
                if worker_id in workers:
                    found.setdefault(worker_id, (after_s, took_s))
        await asyncio.gather(*pending)
    return found


def check_soon(switch: str, firsts: dict[str, tuple[float, float]]) -> None:
    """The first request of the new role ends within a second and its own time."""
    for worker_id, (after_s, took_s) in firsts.items():
        print(f"{switch}: {worker_id} ended its first after {after_s:.3f} s; it took {took_s:.3f} s")
        assert after_s < 1.0 + took_s


async def test_workers_change_roles_both_ways_while_what_they_run_goes_on(planned: PlannedCluster) -> None:
    streams = asyncio.create_task(
        planned.post_all(
            "/v1/completions", [body(n, STREAM_TOKENS) for n in range(NUM_STREAMS)], at_once=NUM_STREAMS
        )
    )
    to_switch = planned.of("decode")[:2]

    def running() -> bool:
        return sum(worker["num_requests"] for worker in planned.workers()) >= NUM_STREAMS

    await asyncio.to_thread(eventually, "all streams run", running, 10.0)
    at_s = await asyncio.to_thread(planned.assign, dict.fromkeys(to_switch, "prefill"))
    firsts = await first_by_each(planned, "prefill_worker", set(to_switch), at_s, 10.0)
    check_soon("decode to prefill", firsts)
    assert not streams.done(), "the streams were to go on during the switch"

    back_s = await asyncio.to_thread(planned.assign, dict.fromkeys(to_switch, "decode"))
    firsts = await first_by_each(planned, "decode_worker", set(to_switch), back_s, 10.0)
    check_soon("prefill to decode", firsts)

    answers = await streams
    assert [answer.status for answer in answers] == [200] * NUM_STREAMS
    assert all(answer.done for answer in answers)
    traces = [planned.trace(answer.id) for answer in answers]
    assert [trace["output_tokens"] for trace in traces] == [STREAM_TOKENS] * NUM_STREAMS
    assert not any(trace["fallbacks"] for trace in traces), "a switch cut a request"
    assert {trace["decode_worker"] for trace in traces} >= set(to_switch)


def test_what_advises_changes_nothing_and_shows_its_decisions(planned: PlannedCluster) -> None:
    before = planned.roles()
    eventually("decisions", lambda: len(planned.planner("?last=5")["decisions"]) == 5, 20.0)
    answer = planned.planner("?last=5")
    assert answer["mode"] == "advise"
    assert answer["trouble"] is None
    numbers = [decision["number"] for decision in answer["decisions"]]
    assert numbers == list(range(numbers[0], numbers[0] + 5))
    assert not any(decision["carried_out"] for decision in answer["decisions"])
    assert planned.roles() == before
    (one,) = planned.planner(f"?number={numbers[0]}")["decisions"]
    assert one["number"] == numbers[0]

    for arguments, expected in (
        (["history", "--last", "3"], "verdict"),
        (["history", "--number", str(numbers[0])], "alternatives"),
        (["status"], "mode advise"),
    ):
        command = [sys.executable, "-m", "deploy.cli", "planner", *arguments, planned.url]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert printed.returncode == 0, printed.stderr
        assert expected in printed.stdout


def test_the_planner_is_scraped_and_sees_every_worker(planned: PlannedCluster) -> None:
    targets = {group["labels"]["process"]: group["targets"] for group in planned.get("/baton/prometheus-sd")}
    (address,) = targets["planner"]
    text = httpx.get(f"http://{address}/metrics").text
    present = [line for line in text.splitlines() if line.startswith("baton_planner_present_workers{")]
    assert sum(float(line.split()[-1]) for line in present) == 4


def test_without_planner_and_without_registry_the_cluster_serves_on_with_its_roles(
    planned: PlannedCluster,
) -> None:
    moved = planned.of("decode")[0]
    planned.assign({moved: "prefill"})
    eventually("the role", lambda: planned.roles()[moved] == "prefill", 5.0)
    roles = planned.roles()
    started_at_s = planned.planner()["started_at_s"]

    killed_s = time.monotonic()
    planned.replica("Planner").kill()
    planned.replica("Registry").kill()
    for number in range(20):
        assert planned.post("/v1/completions", body(number, 2)).status == 200

    def back() -> bool:
        answer = planned.planner()
        return answer["started_at_s"] > started_at_s and bool(answer["decisions"]) and not answer["trouble"]

    eventually("a planner again", back, 60.0)
    print(f"planner and registry back after {time.monotonic() - killed_s:.1f} s")
    assert planned.roles() == roles
    planned.assign({moved: "decode"})
    eventually("the role", lambda: planned.roles()[moved] == "decode", 5.0)
