"""The planner changes worker counts: up with the load, inside the budget, and back to the floor."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.planned_cluster import STEP_MS, PlannedCluster, planned_cluster
from tests.integration.replica_watch import REPLICAS
from tests.integration.served import Answer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
FLOOR, MOST, BUDGET = 1, 5, 4
HOLD_S = 5.0
LONG, SHORT = 3000, 100
"""Tokens of prompts; a long one takes 0.3 s."""
HEAVY_RPS, LIGHT_RPS = 7.0, 2.0
"""Long prompts for 2.1 workers, and next to nothing."""
OUTPUT_TOKENS = 16
SLO = {"ttft_ms": 3000.0, "tpot_ms": 1.6 * STEP_MS}
LIMIT_S = 90.0


@pytest.fixture(scope="module")
def planned(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlannedCluster]:
    with planned_cluster(
        model_path,
        tmp_path_factory.mktemp("planned"),
        mode="auto",
        slo=SLO,
        prefill_ms_per_1k_tokens=100.0,
        shape={"count": 2, "min_count": FLOOR, "max_count": MOST, "initial": {"prefill": 1, "decode": 1}},
        router={"admission": {"early_rejection": False}},  # nothing may fail, late or not
        planner={"gpu_budget": BUDGET, "hold_s": HOLD_S},
    ) as cluster:
        yield cluster


class Load:
    """Requests at a steady rate that may change, until it is left."""

    def __init__(self, planned: PlannedCluster) -> None:
        self.rate_rps, self.prompt_tokens = LIGHT_RPS, SHORT
        self.answers: list[asyncio.Task[Answer]] = []
        self._planned = planned

    async def __aenter__(self) -> Load:
        self._client = httpx.AsyncClient(base_url=self._planned.url, timeout=60.0)
        self._sending = asyncio.create_task(self._send())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._sending.cancel()
        await asyncio.wait([self._sending, *self.answers], timeout=70.0)
        await self._client.aclose()

    async def _send(self) -> None:
        at_s = time.monotonic()
        while True:
            prompt = [1000 + len(self.answers)] * self.prompt_tokens
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
            body["stream"] = True
            send = self._planned.send(self._client, "/v1/completions", body)
            self.answers.append(asyncio.create_task(send))
            at_s = max(at_s + 1.0 / self.rate_rps, time.monotonic() - 1.0)
            await asyncio.sleep(max(0.0, at_s - time.monotonic()))

    async def traces(self, num: int) -> list[dict[str, Any]]:
        """Of the last few that have ended."""
        done = [task.result() for task in self.answers[-100:] if task.done()][-num:]
        return [await asyncio.to_thread(self._planned.trace, answer.id) for answer in done]


def held(planned: PlannedCluster) -> list[int]:
    """Replicas of workers in any state, each time that Serve said so."""
    lines = planned.process.log_tail(1 << 22).split("\n")[:-1]
    said = [json.loads(line.removeprefix(REPLICAS)) for line in lines if line.startswith(REPLICAS)]
    return [sum(sum(states.values()) for states in each.values()) for each in said]


def moves(planned: PlannedCluster) -> list[dict[str, Any]]:
    return list(planned.planner("?moves=true&last=100")["decisions"])


def told(planned: PlannedCluster) -> str:
    """What was decided, for a reader of the test's output."""
    last = planned.planner("?last=1")["decisions"]
    return "\n".join(
        f"{each['number']} {each['verdict']} {each['split']} {each['counts']} "
        f"{[(change['worker_id'], change['role']) for change in each['role_changes']]} "
        f"{each['reason']} {each['failures']}"
        for each in [*moves(planned), *last]
    )


async def until(planned: PlannedCluster, what: str, num_workers: range) -> float:
    """Waits for so many workers to be there; returns how long it took."""
    began_s = time.monotonic()
    while len(await asyncio.to_thread(planned.roles)) not in num_workers:
        late = time.monotonic() > began_s + LIMIT_S
        assert not late, f"{what}: not within {LIMIT_S} s\n{told(planned)}\n{held(planned)}"
        await asyncio.sleep(0.2)
    return time.monotonic() - began_s


async def test_workers_come_with_the_load_and_go_with_it(planned: PlannedCluster) -> None:
    before = await asyncio.to_thread(planned.roles)
    async with Load(planned) as load:
        load.rate_rps, load.prompt_tokens = HEAVY_RPS, LONG
        up_s = await until(planned, "more workers", range(3, BUDGET + 1))
        began_s, serving = time.monotonic(), set[str | None]()
        while not serving:
            assert time.monotonic() < began_s + LIMIT_S, f"nobody new prefills\n{told(planned)}"
            await asyncio.sleep(0.5)
            serving = {trace["prefill_worker"] for trace in await load.traces(10)} - {None, *before}
        serving_s = time.monotonic() - began_s
        roles = await asyncio.to_thread(planned.roles)

        load.rate_rps, load.prompt_tokens = LIGHT_RPS, SHORT
        began_s, at_floor = time.monotonic(), list[str]()
        while at_floor != ["decode"]:  # who looks in on a busy machine may come back once
            late = time.monotonic() > began_s + LIMIT_S
            assert not late, f"{at_floor}\n{told(planned)}\n{held(planned)}"
            down_s = await until(planned, "the floor", range(FLOOR, FLOOR + 1))
            sent_at_floor = len(load.answers)
            await asyncio.sleep(3.0)
            at_floor = sorted((await asyncio.to_thread(planned.roles)).values())
    answers = [task.result() for task in load.answers]
    assert {answer.status for answer in answers} == {200}
    assert all(answer.done for answer in answers)
    assert len(answers) > sent_at_floor
    assert max(held(planned)) <= BUDGET, held(planned)
    counts = [move["counts"]["mock"] for move in moves(planned) if move["counts"]]
    most = counts.index(max(counts))
    assert counts[most] > 2
    assert FLOOR in counts[most:]
    print(
        f"{len(answers)} requests; workers after {up_s:.1f} s, a new one prefills {serving_s:.1f} s later "
        f"({roles}), the floor {down_s:.1f} s after the load ended; held {held(planned)}\n{told(planned)}"
    )
