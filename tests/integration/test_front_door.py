"""What a client meets at the door: refusals with a status, targets of its own, the reasons of decisions."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.integration.baton_command import Commands, mock_config
from tests.integration.cluster_process import READY, start_cluster
from tests.integration.server_process import HOST, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

NUM_AT_ONCE = 60
PROMPT_TOKENS = 3000
"""A worker computes them for 150 ms."""


@pytest.fixture(scope="module")
def url(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run_dir = tmp_path_factory.mktemp("front door")
    config = mock_config(model_path, free_port())
    config["models"][0]["shapes"][0]["mock"] = {
        "decode_step_ms": 5,
        "prefill_ms_per_1k_tokens": 50,
        "kv_blocks": 65_536,  # whoever waits, waits for time
    }
    config["router"]["log_decisions"] = True
    path = run_dir / "cluster.yaml"
    path.write_text(json.dumps(config))
    cluster = start_cluster(path, run_dir / "cluster.log")
    try:
        cluster.wait_until(lambda: READY in cluster.log_tail(), 120)
        yield f"http://{HOST}:{config['router']['port']}"
    finally:
        cluster.stop(grace_s=40)


@pytest_asyncio.fixture(loop_scope="module")
async def client(url: str):
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:
        yield client


def body(seed: int, num_tokens: int = PROMPT_TOKENS, **fields: Any) -> dict[str, Any]:
    prompt = [1000 + (seed * 7919 + i) % 900 for i in range(num_tokens)]
    return {"model": "mocked", "prompt": prompt, "max_tokens": 4, "ignore_eos": True, **fields}


async def taught(client: httpx.AsyncClient) -> None:
    """Returns once the router has learned how long steps take: no profile was given."""
    for seed in range(200):
        await client.post("/v1/completions", json=body(10_000 + seed, num_tokens=200 + 10 * seed))
        answer = await client.post("/baton/explain", json={"prompt": "Where to?"})
        if answer.json()["decision"]["ttft_s"] is not None:
            return
    raise AssertionError("the router never learned how long steps take")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_would_be_late_is_told_so_with_a_status_and_a_time_to_come_back(
    client: httpx.AsyncClient, stream: bool
) -> None:
    await taught(client)
    headers = {"X-Baton-TTFT-SLO-Ms": "800"}
    answers = await asyncio.gather(
        *(
            client.post("/v1/completions", json=body(i, stream=stream), headers=headers)
            for i in range(NUM_AT_ONCE)
        )
    )
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() <= {200, 429, 503}
    assert statuses[200] >= 2
    assert statuses[429] + statuses[503] >= NUM_AT_ONCE // 3
    for answer in answers:
        if answer.status_code == 200:
            assert "error" not in answer.text
        else:
            assert int(answer.headers["retry-after"]) >= 1
            assert "try again" in answer.json()["error"]["message"]
    assert (await client.post("/v1/completions", json=body(999, stream=stream))).status_code == 200


async def test_more_patient_requests_wait_instead(client: httpx.AsyncClient) -> None:
    await taught(client)
    headers = {"X-Baton-TTFT-SLO-Ms": "60000"}
    answers = await asyncio.gather(
        *(client.post("/v1/completions", json=body(i), headers=headers) for i in range(100, 120))
    )
    assert {answer.status_code for answer in answers} == {200}


@pytest.mark.parametrize("value", ["soon", "0", "-5", "nan", "inf"])
async def test_a_target_that_means_nothing_is_refused(client: httpx.AsyncClient, value: str) -> None:
    answer = await client.post("/v1/completions", json=body(1), headers={"X-Baton-TTFT-SLO-Ms": value})
    assert answer.status_code == 400
    assert "x-baton-ttft-slo-ms: must be milliseconds above 0" in answer.json()["error"]["message"]


async def test_a_decision_can_be_asked_for(client: httpx.AsyncClient, url: str, tmp_path: Path) -> None:
    baton = Commands(tmp_path)
    await taught(client)
    answer = await client.post("/v1/completions", json=body(500))  # all of them are kept in this cluster
    request_id = answer.json()["id"]
    await asyncio.sleep(0.2)
    trace = (await client.get(f"/baton/requests/{request_id}")).json()
    (explanation,) = trace["explanations"]
    assert explanation["prompt_tokens"] == PROMPT_TOKENS
    assert {row["role"] for row in explanation["candidates"]} == {"prefill", "decode"}
    assert explanation["decision"]["prefill_worker"] == trace["prefill_worker"]

    shown = await asyncio.to_thread(baton.run, "explain", request_id, "--cluster", url)
    assert shown.returncode == 0, shown.stderr
    assert trace["prefill_worker"] in shown.stdout.replace("\n", "")
    shown = await asyncio.to_thread(baton.run, "explain", "--prompt", "Where to?", "--cluster", url)
    assert shown.returncode == 0, shown.stderr
    assert "workers for" in shown.stdout
    shown = await asyncio.to_thread(baton.run, "explain", "cmpl-unknown", "--cluster", url)
    assert shown.returncode == 1
    assert "no router has this request" in shown.stderr
