"""Pulls that must not happen: too late, stopped in the middle, or with a handle that is not exactly right.

Whatever becomes of the pull, the engines live and the answer is that of one engine alone.
"""

from __future__ import annotations

import asyncio
import hmac
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens
from engine.vllm_engine import VllmEngine
from kv_transfer.handle import KvHandle, KvScope
from kv_transfer.params import Outcome, PinnedKv, keep_for_pull, pinned_kv, pull
from tests.integration import prompts
from tests.integration.vllm_workers import (
    CLUSTER_KEY,
    VllmWorker,
    greedy,
    next_id,
    reference,
    run,
    vllm_worker,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

LEASE_S = 2
NUM_TOKENS = 8
LONG_TOKENS = 4000
"""A read of 32 MiB: several milliseconds in which it can be stopped."""
CACHE = {"max_model_len": 4800, "kv_cache_memory_bytes": 40 << 20}
"""Room for one long prompt and little more: the next one overwrites it."""
STOPS_WANTED = 3
MAX_ATTEMPTS = 25


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(model_path: Path) -> AsyncIterator[tuple[VllmWorker, VllmWorker]]:
    """A prefill and a decode worker with a short lease."""
    async with (
        vllm_worker("prefill", model_path, lease_s=LEASE_S, **CACHE) as prefill,
        vllm_worker("decode", model_path, lease_s=LEASE_S, **CACHE) as decode,
    ):
        yield prefill, decode


async def prefilled(engine: VllmEngine, prompt: list[int]) -> tuple[int, PinnedKv]:
    answer, last = await run(engine, greedy(prompt, 1, keep_for_pull()))
    pinned = pinned_kv(last.kv_params)
    assert pinned is not None
    return answer.token_ids[0], pinned


async def lease_ended(engine: VllmEngine) -> None:
    async with asyncio.timeout(LEASE_S + 5):
        while engine.load().num_pinned or engine.load().kv_used_blocks:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def overwrite(engine: VllmEngine) -> None:
    """Fills the whole cache with another prompt."""
    await run(engine, greedy(prompts.tokens(4700, next_id("other")), 1))


@pytest.mark.fault_row(10)
async def test_a_pull_within_the_lease_is_right(pair: tuple[VllmWorker, VllmWorker]) -> None:
    prefill, decode = pair
    prompt = prompts.tokens(1000, "in time")

    first, pinned = await prefilled(prefill.engine, prompt)
    answer, _ = await run(
        decode.engine,
        greedy([*prompt, first], NUM_TOKENS, pull(pinned.connector_params, pinned.expires_at_s)),
    )

    assert answer.report is not None
    assert answer.report.outcome is Outcome.PULLED
    assert [first, *answer.token_ids] == await reference(decode.engine, prompt, NUM_TOKENS + 1)


@pytest.mark.fault_row(10)
async def test_a_pull_after_the_lease_is_recomputed(pair: tuple[VllmWorker, VllmWorker]) -> None:
    prefill, decode = pair
    prompt = prompts.tokens(1000, "too late")

    first, pinned = await prefilled(prefill.engine, prompt)
    await lease_ended(prefill.engine)
    await overwrite(prefill.engine)
    answer, _ = await run(
        decode.engine,
        greedy([*prompt, first], NUM_TOKENS, pull(pinned.connector_params, pinned.expires_at_s)),
    )

    assert answer.report is not None
    assert (answer.report.outcome, answer.report.reason) == (Outcome.RECOMPUTED, "lease_over")
    assert answer.report.num_bytes == 0
    assert [first, *answer.token_ids] == await reference(decode.engine, prompt, NUM_TOKENS + 1)


@pytest.mark.fault_row(10)
async def test_a_lease_that_is_renewed_meanwhile_holds(pair: tuple[VllmWorker, VllmWorker]) -> None:
    prefill, decode = pair
    prompt = prompts.tokens(1000, "renewed")

    first, pinned = await prefilled(prefill.engine, prompt)
    renewed = await prefill.engine.renew_kv([pinned.engine_request_id], 5 * LEASE_S)
    await asyncio.sleep(1.5 * LEASE_S)
    answer, _ = await run(
        decode.engine,
        greedy(
            [*prompt, first],
            NUM_TOKENS,
            pull(pinned.connector_params, renewed[pinned.engine_request_id]),
        ),
    )

    assert answer.report is not None
    assert answer.report.outcome is Outcome.PULLED
    assert [first, *answer.token_ids] == await reference(decode.engine, prompt, NUM_TOKENS + 1)


@pytest.mark.fault_row(10)
async def test_a_decode_engine_stopped_in_mid_read_until_the_blocks_hold_another_prompt(
    pair: tuple[VllmWorker, VllmWorker],
) -> None:
    prefill, decode = pair
    seen: Counter[str] = Counter()
    source = random.Random(0)
    earliest_s, latest_s = 0.0, 0.03
    for attempt in range(MAX_ATTEMPTS):
        delay_s = source.uniform(earliest_s, latest_s)
        when = await stop_during_a_pull(prefill, decode, f"stopped {attempt}", delay_s)
        seen[when] += 1
        print(f"stopped after {delay_s * 1e3:.1f} ms: {when} the read")
        # Towards the read, but not into a corner: each attempt has its own timing.
        if when == "before":
            earliest_s = min(delay_s, latest_s * 0.9)
        elif when == "after":
            latest_s = max(delay_s, earliest_s * 1.1)
        if seen["in"] >= STOPS_WANTED:
            break
    assert seen["in"] >= STOPS_WANTED, seen


async def stop_during_a_pull(prefill: VllmWorker, decode: VllmWorker, seed: str, delay_s: float) -> str:
    """Stops the decode engine ``delay_s`` after it got the request, and checks every answer after that.

    Returns:
        When that was: ``before``, ``in`` or ``after`` the read.
    """
    prompt = prompts.tokens(LONG_TOKENS, seed)
    expected = await reference(prefill.engine, prompt, NUM_TOKENS + 1)
    first, pinned = await prefilled(prefill.engine, prompt)
    assert first == expected[0]
    request = greedy([*prompt, first], NUM_TOKENS, pull(pinned.connector_params, pinned.expires_at_s))
    pulling = asyncio.create_task(run(decode.engine, request))
    await asyncio.sleep(delay_s)
    for process in decode.engine_processes:
        process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(max(pinned.expires_at_s - time.monotonic(), 0))
        await lease_ended(prefill.engine)
        await overwrite(prefill.engine)
    finally:
        for process in decode.engine_processes:
            process.send_signal(signal.SIGCONT)
    answer, _ = await pulling

    assert [first, *answer.token_ids] == expected
    for _ in range(2):  # whatever was cached by then is right
        again, _ = await run(decode.engine, greedy(prompt, NUM_TOKENS + 1))
        assert again.token_ids == expected
    assert answer.report is not None
    if answer.report.outcome is Outcome.PULLED:
        return "after"
    assert answer.report.reason == "lease_over"
    return "in" if answer.report.num_bytes else "before"


@dataclass(frozen=True)
class Handoff:
    """A good handle, and what is needed to spoil it."""

    prefill: VllmWorker
    decode: VllmWorker
    prompt: list[int]
    handle: worker_pb2.KvHandle

    @property
    def checked(self) -> KvHandle:
        return self.prefill.codec.check(self.handle, pack_tokens(self.prompt), NOBODY)

    def minted(
        self, key: bytes = CLUSTER_KEY, scope: KvScope | None = None, **identity: Any
    ) -> worker_pb2.KvHandle:
        codec = self.prefill.codec_with(key, **identity)
        return codec.mint(self.checked, pack_tokens(self.prompt), scope or NOBODY)

    def changed(self, **fields: Any) -> worker_pb2.KvHandle:
        return self.prefill.codec.mint(replace(self.checked, **fields), pack_tokens(self.prompt), NOBODY)

    def minted_for(self, prompt: list[int], **fields: Any) -> worker_pb2.KvHandle:
        return self.prefill.codec.mint(replace(self.checked, **fields), pack_tokens(prompt), NOBODY)

    def with_params(self, **params: Any) -> worker_pb2.KvHandle:
        return self.changed(connector_params={**self.checked.connector_params, **params})


NOBODY = KvScope(adapter="", tenant="")
Spoil = Callable[[Handoff], worker_pb2.KvHandle]


def _signed(body: bytes) -> worker_pb2.KvHandle:
    return worker_pb2.KvHandle(body=body, mac=hmac.digest(CLUSTER_KEY, body, "sha256"))


BAD_HANDLES: dict[str, tuple[Spoil, str]] = {
    "nothing": (lambda h: worker_pb2.KvHandle(), "forged"),
    "a changed byte": (
        lambda h: worker_pb2.KvHandle(
            body=bytes([h.handle.body[0] ^ 1]) + h.handle.body[1:], mac=h.handle.mac
        ),
        "forged",
    ),
    "no signature": (lambda h: worker_pb2.KvHandle(body=h.handle.body), "forged"),
    "a truncated body": (
        lambda h: worker_pb2.KvHandle(body=h.handle.body[:-9], mac=h.handle.mac),
        "forged",
    ),
    "a truncated body, signed": (lambda h: _signed(h.handle.body[:-9]), "malformed"),
    "noise, signed": (lambda h: _signed(b"\xff" * 100), "malformed"),
    "seventeen megabytes": (lambda h: _signed(b"\0" * (17 << 20)), "oversized"),
    "another cluster's key": (lambda h: h.minted(key=b"another cluster's key, long enough"), "forged"),
    "another model": (lambda h: h.minted(model="other"), "other_model"),
    "another revision": (lambda h: h.minted(revision="v2"), "other_model"),
    "another block size": (lambda h: h.minted(block_size_tokens=64), "other_layout"),
    "another layout": (lambda h: h.minted(kv_layout="0123456789abcdef"), "other_layout"),
    "another adapter": (lambda h: h.minted(scope=KvScope(adapter="a", tenant="")), "other_scope"),
    "another tenant": (lambda h: h.minted(scope=KvScope(adapter="", tenant="t")), "other_scope"),
    "other tokens": (
        lambda h: h.minted_for(prompts.tokens(300, "other tokens")),
        "other_tokens",
    ),
    "more tokens": (
        lambda h: h.minted_for([*h.prompt, *h.prompt], num_tokens=400),
        "other_tokens",
    ),
    "an earlier start of the prefill worker": (lambda h: h.changed(incarnation="earlier"), "stale"),
    "a prefill worker that is gone": (
        lambda h: h.changed(address="127.0.0.1:9", incarnation="gone"),
        "peer_unreachable",
    ),
    "the decode worker itself": (
        lambda h: h.changed(incarnation=h.decode.engine.info.incarnation),
        "own",
    ),
    "a lease that is over": (lambda h: h.changed(expires_at_s=time.monotonic() - 0.1), "lease_over"),
    "too few blocks": (lambda h: h.with_params(remote_block_ids=[[1]]), "too_few_blocks"),
    "two cache groups": (
        lambda h: h.with_params(remote_block_ids=[[1, 2, 3], [4, 5, 6]]),
        "other_cache_groups",
    ),
    "blocks that do not exist": (
        lambda h: h.with_params(remote_block_ids=[[10**6, 10**6 + 1, 10**6 + 2]]),
        "pull_failed",
    ),
    "an engine that nobody knows": (lambda h: h.with_params(remote_engine_id="nobody"), "pull_failed"),
}


@pytest.mark.fault_row(11)
@pytest.mark.parametrize("name", BAD_HANDLES)
async def test_a_handle_that_is_not_exactly_right_is_recomputed(
    name: str, pair: tuple[VllmWorker, VllmWorker]
) -> None:
    prefill, decode = pair
    spoil, reason = BAD_HANDLES[name]
    prompt = prompts.tokens(300, f"handle {name}")
    prefilled = await prefill.prefill(prompt)

    handle = spoil(Handoff(prefill, decode, prompt, prefilled.handle))
    rest, transfer = await decode.decode([*prompt, prefilled.first_token], NUM_TOKENS, handle)

    await prefill.link.release([prefilled.request_id])
    assert (transfer.outcome, transfer.reason, transfer.num_bytes) == (transfer.RECOMPUTED, reason, 0)
    assert [prefilled.first_token, *rest] == await reference(prefill.engine, prompt, NUM_TOKENS + 1)


@pytest.mark.fault_row(11)
async def test_a_good_handle_still_pulls_after_all_those(pair: tuple[VllmWorker, VllmWorker]) -> None:
    prefill, decode = pair
    prompt = prompts.tokens(300, "good handle")

    prefilled = await prefill.prefill(prompt)
    rest, transfer = await decode.decode([*prompt, prefilled.first_token], NUM_TOKENS, prefilled.handle)

    assert (transfer.outcome, transfer.reason) == (transfer.PULLED, "")
    assert [prefilled.first_token, *rest] == await reference(prefill.engine, prompt, NUM_TOKENS + 1)


async def test_both_workers_are_empty_afterwards(pair: tuple[VllmWorker, VllmWorker]) -> None:
    for worker in pair:
        await worker.wait_empty()
