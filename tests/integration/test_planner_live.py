"""The planner in charge of a running cluster: what the load asks for is carried out, and requests go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.planned_cluster import STEP_MS, PlannedCluster, planned_cluster
from tests.integration.served import Answer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
PROMPT_TOKENS = 3000
OUTPUT_TOKENS = 16
PREFILL_MS_PER_1K_TOKENS = 100.0
RATE_RPS = 8.0
"""Prompts for 2.4 workers. One prefills at the start; what the three others would have to take makes their
steps twice as long, past the target."""
SLO = {"ttft_ms": 3000.0, "tpot_ms": 1.6 * STEP_MS}
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def planned(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlannedCluster]:
    admission = {"admission": {"early_rejection": False}}  # nothing may fail, late or not
    with planned_cluster(
        model_path,
        tmp_path_factory.mktemp("planned"),
        mode="auto",
        slo=SLO,
        prefill_ms_per_1k_tokens=PREFILL_MS_PER_1K_TOKENS,
        router=admission,
    ) as cluster:
        yield cluster


def decisions(cluster: PlannedCluster) -> str:
    """The last few, for a failure's message."""
    last = cluster.planner("?last=1000")["decisions"][::5]
    return "\n".join(f"{each['verdict']} {each['split']} {each['reason']} {each['inputs']}" for each in last)


async def test_prompts_beyond_one_workers_power_make_a_decode_worker_prefill(
    planned: PlannedCluster,
) -> None:
    before = planned.of("decode")
    moved: set[str] = set()
    answers: list[asyncio.Task[Answer]] = []
    began_s = time.monotonic()
    async with httpx.AsyncClient(base_url=planned.url, timeout=60.0) as client:
        served_at_s = None
        while served_at_s is None:
            assert time.monotonic() < began_s + LIMIT_S, decisions(planned)
            prompt = [1000 + len(answers)] * PROMPT_TOKENS
            body: dict[str, Any] = {
                "prompt": prompt,
                "max_tokens": OUTPUT_TOKENS,
                "ignore_eos": True,
                "stream": True,
            }
            answers.append(asyncio.create_task(planned.send(client, "/v1/completions", body)))
            await asyncio.sleep(max(0.0, began_s + len(answers) / RATE_RPS - time.monotonic()))
            if len(answers) % 10 == 0:
                moved = set(before) & set(await asyncio.to_thread(planned.of, "prefill"))
                done = [task.result() for task in answers if task.done()][-30:]
                by = {(await asyncio.to_thread(planned.trace, each.id))["prefill_worker"] for each in done}
                if by & moved:
                    served_at_s = time.monotonic() - began_s
        results = await asyncio.gather(*answers)
    assert {result.status for result in results} == {200}
    assert all(result.done for result in results)

    moves = planned.planner("?moves=true&last=50")["decisions"]
    assert all(move["carried_out"] and not move["failures"] for move in moves)
    told = {
        change["worker_id"]
        for move in moves
        for change in move["role_changes"]
        if change["role"] == "prefill"
    }
    assert moved <= told
    print(
        f"{served_at_s:.1f} s after the load began {sorted(moved)} prefill; first move: {moves[0]['reason']}"
    )
