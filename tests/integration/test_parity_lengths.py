"""Greedy answers to prompts of every length around the block boundaries, against plain vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.integration import prompts
from tests.integration.parity import complete, differences
from tests.integration.served import Answer, Served, ServedByBaton

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

BLOCK_TOKENS = 128
LENGTHS = range(1, 3 * BLOCK_TOKENS + 2)
OUTPUT_TOKENS = 6
TIE_GAP = 1e-3
MAX_TIES = 4
LEAST_REMOTE = 0.9


def request(length: int) -> dict[str, Any]:
    return {
        "prompt": prompts.tokens(length, seed=f"length {length}"),
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "logprobs": 2,
        "return_token_ids": True,
        "stream": length % 2 == 0,
        "stream_options": {"include_usage": True} if length % 2 == 0 else None,
    }


def test_prompts_of_every_length_up_to_three_blocks_and_one_token_give_the_same_tokens(
    cluster: ServedByBaton, plain: Served
) -> None:
    bodies = [request(length) for length in LENGTHS]
    theirs = asyncio.run(plain.post_all("/v1/completions", bodies))
    ours = asyncio.run(cluster.post_all("/v1/completions", bodies))

    wrong, num_ties = {}, 0
    for length, mine, reference in zip(LENGTHS, ours, theirs, strict=True):
        assert reference.status == 200, reference.body
        found = differences(complete(mine), complete(reference))
        if found and is_tie(mine, reference):
            num_ties += 1
        elif found:
            wrong[length] = found[:3]
    assert wrong == {}
    assert num_ties <= MAX_TIES

    traces = {length: cluster.trace(answer.id) for length, answer in zip(LENGTHS, ours, strict=True)}
    # On a busy machine decode workers help out with prompts that would be late.
    remote = {length: trace for length, trace in traces.items() if trace["path"] == "remote_early"}
    assert len(remote) > LEAST_REMOTE * len(traces)
    assert {length for length, trace in remote.items() if trace["kv_outcome"] != "pulled"} == set()
    assert all(trace["kv_bytes"] > 0 for trace in remote.values())
    assert {trace["fallbacks"] != [] for trace in traces.values()} == {False}
    cluster.wait_idle(within_s=12)


def is_tie(ours: Answer, theirs: Answer) -> bool:
    """Whether the first other token is one that the reference itself could as well have taken."""
    mine, reference = complete(ours)["choices"][0], complete(theirs)["choices"][0]
    pairs = zip(mine["token_ids"], reference["token_ids"], strict=False)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return False
    best, second = sorted(reference["logprobs"]["top_logprobs"][first].values(), reverse=True)[:2]
    return best - second < TIE_GAP
