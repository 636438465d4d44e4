"""Handoffs between engines of unlike tensor parallel size, in both directions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.integration import prompts
from tests.integration.vllm_workers import VllmWorker, greedy, reference, run, vllm_worker

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

LENGTHS = (1, 2, 127, 128, 129, 255, 256, 257, 300, 640, 769)
NUM_TOKENS = 10


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(model_path: Path) -> AsyncIterator[dict[int, VllmWorker]]:
    """By tensor parallel size."""
    async with (
        vllm_worker("one", model_path) as one,
        vllm_worker("two", model_path, tensor_parallel_size=2) as two,
    ):
        yield {1: one, 2: two}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 2), (2, 1)], ids=["TP1 to TP2", "TP2 to TP1"])
async def test_a_handoff_between_unlike_workers_gives_the_answer_of_one_engine(
    prefill_tp: int, decode_tp: int, length: int, workers: dict[int, VllmWorker]
) -> None:
    prompt = prompts.tokens(length, f"tp {prefill_tp} {length}")
    source, target = workers[prefill_tp], workers[decode_tp]

    prefilled = await source.prefill(prompt)
    rest, transfer = await target.decode([*prompt, prefilled.first_token], NUM_TOKENS - 1, prefilled.handle)

    alone = await reference(workers[1].engine, prompt, NUM_TOKENS)
    assert [prefilled.first_token, *rest] == alone
    assert (transfer.outcome, transfer.reason) == (transfer.PULLED, "")
    num_blocks = -(-length // target.engine.info.block_size_tokens)
    assert transfer.num_bytes == num_blocks * target.engine.info.bytes_per_block


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 2), (2, 1)], ids=["TP1 to TP2", "TP2 to TP1"])
async def test_only_what_the_cache_lacks_is_pulled(
    prefill_tp: int, decode_tp: int, workers: dict[int, VllmWorker]
) -> None:
    prompt = prompts.tokens(500, f"tp cached {prefill_tp}")
    source, target = workers[prefill_tp], workers[decode_tp]
    await run(target.engine, greedy(prompt[:260], 1))

    prefilled = await source.prefill(prompt)
    rest, transfer = await target.decode([*prompt, prefilled.first_token], NUM_TOKENS - 1, prefilled.handle)

    alone = await reference(workers[1].engine, prompt, NUM_TOKENS)
    assert [prefilled.first_token, *rest] == alone
    assert transfer.outcome == transfer.PULLED
    assert transfer.num_bytes == 2 * target.engine.info.bytes_per_block


async def test_both_workers_are_empty_afterwards(workers: dict[int, VllmWorker]) -> None:
    for worker in workers.values():
        await worker.wait_empty()
