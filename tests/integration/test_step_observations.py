"""Steps of a real engine are observed as long as they are, and put a wrong profile right."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path

import pytest

from core.corrected_step_time import CorrectedStepTime
from core.observed_steps import StepObservation
from core.performance_model import LinearStepTime, PrefillChunk, ScaledStepTime
from engine.pacing import KEY_PREFIX
from tests.integration import prompts
from tests.integration.vllm_workers import VllmWorker, greedy, next_id, run, vllm_worker

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

PACE = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.5,
    prefill_base_ms=80.0,
    decode_base_ms=60.0,
    decode_ms_per_seq=5.0,
    decode_ms_per_kv_token=0.05,
)
"""What the engine's steps last: far more than it computes."""
HEARTBEAT_S = 0.5
LEARNING_S = 60.0
CHUNK = PrefillChunk(context_tokens=0, num_tokens=300, ends_prompt=True)


async def one_by_one(worker: VllmWorker) -> None:
    """Prompts of several lengths, some in two chunks, with the engine idle in between."""
    for num_tokens in (60, 120, 240, 480, 700, 900):
        await run(worker.engine, greedy(prompts.tokens(num_tokens, next_id("steps")), 1))
        await asyncio.sleep(0.3)


async def together(worker: VllmWorker, num_streams: int, num_tokens: int) -> None:
    """Streams that decode side by side, begun one after the other."""
    async with asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            request = greedy(prompts.tokens(200, next_id("steps")), num_tokens)
            group.create_task(run(worker.engine, request))
            await asyncio.sleep(0.1)


@pytest.fixture
async def worker(model_path: Path) -> AsyncIterator[VllmWorker]:
    pace = {f"{KEY_PREFIX}{field.name}": getattr(PACE, field.name) for field in fields(PACE)}
    async with vllm_worker(
        "steps",
        model_path,
        worker_cls="engine.paced_worker.PacedCPUWorker",
        additional_config=pace,
        max_num_seqs=8,
        max_num_batched_tokens=512,
    ) as worker:
        yield worker


async def test_steps_are_observed_as_long_as_they_are_and_put_a_profile_right(worker: VllmWorker) -> None:
    wrong = [CorrectedStepTime(ScaledStepTime(step_time=PACE, factor=factor)) for factor in (0.5, 2.0)]
    seen: list[StepObservation] = []

    async def heartbeats() -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            steps = worker.engine.take_steps()
            seen.extend(steps)
            for step_time in wrong:
                step_time.observe_steps(steps)

    started_s = time.monotonic()
    beating = asyncio.create_task(heartbeats())
    for num_streams in (1, 4):
        await one_by_one(worker)
        await together(worker, num_streams, 24)
    await asyncio.sleep(2 * HEARTBEAT_S)
    beating.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await beating

    assert time.monotonic() - started_s < LEARNING_S
    assert not worker.engine.take_steps()
    kinds = {
        "prompts": [step for step in seen if step.prefills and not step.num_decoding],
        "decodes": [step for step in seen if not step.prefills],
    }
    for kind, steps in kinds.items():
        ratios = [
            step.seconds / PACE.step_s(step.prefills, step.num_decoding, step.decode_kv_tokens)
            for step in steps
        ]
        assert len(ratios) >= 5, kind
        assert statistics.median(ratios) == pytest.approx(1.0, abs=0.05), kind
        assert sum(abs(ratio - 1) < 0.15 for ratio in ratios) >= 0.8 * len(ratios), (kind, ratios)
    assert {chunk.ends_prompt for step in kinds["prompts"] for chunk in step.prefills} == {True, False}
    assert max(step.num_decoding for step in kinds["decodes"]) == 4
    for step_time in wrong:
        for work in (((CHUNK,), 0, 0), ((), 4, 900), ((CHUNK,), 2, 450)):
            assert step_time.step_s(*work) == pytest.approx(PACE.step_s(*work), rel=0.15), work
