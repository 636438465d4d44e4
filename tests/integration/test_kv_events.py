"""What a real engine's cache log says is what a second request finds cached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import pytest_asyncio
from vllm.distributed import kv_events as theirs
from vllm.lora.request import LoRARequest

from baton_proto import worker_pb2_grpc
from core.prompt_blocks import chain_states, root_state
from engine import cached_blocks as ours
from engine.base import EngineRequest
from engine.cache_service import CacheFeedService
from engine.kv_events import KvEventReader
from engine.vllm_codec import encode_options
from engine.vllm_engine import VllmEngine
from router.cache_feed import CacheFeed, States
from tests.integration.adapter import make_adapter
from tests.integration.prompts import tokens
from tests.integration.vllm_workers import VllmWorker, greedy, next_id, run, vllm_worker

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

NUM_BLOCKS = 24
BLOCK_BYTES = 128 * 2 * 4 * 256 * 4
"""128 tokens of keys and values in 4 layers, each 256 numbers of float32."""
ADAPTER = "adapted"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(model_path: Path) -> AsyncIterator[VllmWorker]:
    """An engine with room for three of the longest sequences."""
    async with vllm_worker(
        "cached",
        model_path,
        kv_events=True,
        kv_cache_memory_bytes=NUM_BLOCKS * BLOCK_BYTES,
        enable_lora=True,
    ) as worker:
        yield worker


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  the log says nothing to a test
            await asyncio.sleep(0.01)


async def cached_tokens(engine: VllmEngine, request: EngineRequest, **scope: str) -> int:
    """How many prompt tokens the engine did not compute; now the log knows that it has them all."""
    async for delta in engine.generate(request):
        if delta.num_cached_tokens is not None:
            found = delta.num_cached_tokens
    prompt, block_size = list(request.prompt_token_ids), engine.info.block_size_tokens
    num_kept = (len(prompt) - 1) // block_size * block_size
    await until(lambda: predicted_tokens(engine, prompt, **scope) == num_kept)
    return found


def states(engine: VllmEngine, prompt: list[int], *, adapter: str = "", salt: str = "") -> list[int]:
    root = root_state(model=engine.info.model, adapter=adapter, salt=salt)
    return chain_states(root, prompt, engine.info.block_size_tokens).tolist()


def predicted_tokens(engine: VllmEngine, prompt: list[int], **scope: str) -> int:
    """What the log says a request with this prompt will find; its last token is always computed."""
    num_hits = 0
    usable = prompt[:-1]
    for state in states(engine, usable, **scope):
        if state not in engine.cache_log:
            break
        num_hits += 1
    return num_hits * engine.info.block_size_tokens


async def reset_cache(engine: VllmEngine) -> None:
    """vLLM publishes the clear with the next step's events."""
    assert await engine._llm.reset_prefix_cache()
    await cached_tokens(engine, greedy(tokens(3, next_id("after a reset")), 1))
    await until(lambda: len(engine.cache_log) == 0)


async def test_a_shared_prefix_is_predicted_to_the_token(worker: VllmWorker) -> None:
    engine = worker.engine
    shared = tokens(5 * 128, next_id("shared"))
    for num_own in (0, 1, 127, 128, 200, 300):
        for _ in range(2):
            prompt = shared + tokens(num_own, f"own {num_own}")
            prediction = predicted_tokens(engine, prompt)
            assert await cached_tokens(engine, greedy(prompt, 1)) == prediction, num_own
    assert predicted_tokens(engine, [*shared, 5]) == 5 * 128


async def test_blocks_that_decode_fills_are_known_too(worker: VllmWorker) -> None:
    engine = worker.engine
    prompt = tokens(100, next_id("grows"))
    answer = [token async for delta in engine.generate(greedy(prompt, 200)) for token in delta.token_ids]
    longer = prompt + answer
    await until(lambda: predicted_tokens(engine, longer) == 256)
    assert await cached_tokens(engine, greedy(longer, 1)) == 256


async def test_evictions_are_told_and_the_log_never_holds_more_than_the_engine(worker: VllmWorker) -> None:
    engine = worker.engine
    prompts = [tokens(4 * 128 + 1, f"evicted {i}") for i in range(12)]
    for _ in range(2):
        for prompt in prompts + prompts[-3:] + prompts[:1]:
            prediction = predicted_tokens(engine, prompt)
            assert await cached_tokens(engine, greedy(prompt, 1)) == prediction
            assert len(engine.cache_log) <= engine.info.num_kv_blocks
    assert sum(predicted_tokens(engine, prompt) for prompt in prompts) < len(prompts) * 4 * 128


async def test_requests_at_once_leave_the_log_right(worker: VllmWorker) -> None:
    """Equal prompts at the same time make two blocks of one content."""
    engine = worker.engine
    prompts = [tokens(3 * 128 + 1, f"at once {i % 3}") for i in range(9)]
    for _ in range(3):
        await asyncio.gather(*(run(engine, greedy(prompt, 4)) for prompt in prompts))
        await until(lambda: all(predicted_tokens(engine, prompt) == 3 * 128 for prompt in prompts[:3]))
    for prompt in prompts[:3] + [tokens(3 * 128 + 1, f"at once {i}") for i in range(10, 30)] + prompts[:3]:
        prediction = predicted_tokens(engine, prompt)
        assert await cached_tokens(engine, greedy(prompt, 1)) == prediction
    held = sum(predicted_tokens(engine, prompt) for prompt in prompts[:3])
    assert held == 3 * 3 * 128
    assert len(engine.cache_log) <= engine.info.num_kv_blocks


async def test_salts_and_adapters_share_nothing(worker: VllmWorker, model_path: Path, tmp_path: Path) -> None:
    engine = worker.engine
    await reset_cache(engine)
    lora = LoRARequest(ADAPTER, 1, str(make_adapter(tmp_path / "adapter", model_path)))
    prompt = tokens(2 * 128 + 1, next_id("scoped"))
    scopes: list[tuple[dict[str, str], dict[str, Any]]] = [
        ({}, {}),
        ({"salt": "s"}, {"cache_salt": "s"}),
        ({"salt": "t"}, {"cache_salt": "t"}),
        ({"adapter": ADAPTER}, {"lora": lora}),
        ({"adapter": ADAPTER, "salt": "s"}, {"lora": lora, "cache_salt": "s"}),
    ]
    for expected in (0, 256):
        for scope, options in scopes:
            request = replace(greedy(prompt, 1), options=encode_options(**options))
            assert predicted_tokens(engine, prompt, **scope) == expected, scope
            assert await cached_tokens(engine, request, **scope) == expected, scope


async def test_a_reset_of_the_cache_empties_the_log(worker: VllmWorker) -> None:
    engine = worker.engine
    prompt = tokens(2 * 128 + 1, next_id("reset"))
    await cached_tokens(engine, greedy(prompt, 1))
    assert predicted_tokens(engine, prompt) == 256
    await reset_cache(engine)
    assert await cached_tokens(engine, greedy(prompt, 1)) == 0
    assert predicted_tokens(engine, prompt) == 256


class Index:
    """What a router knows of the worker."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def replace(self, incarnation: str, states: States) -> None:
        self.known = set(states.tolist())

    def store(self, incarnation: str, states: States) -> None:
        self.known |= set(states.tolist())

    def evict(self, incarnation: str, states: States) -> None:
        self.known -= set(states.tolist())


async def test_a_router_knows_what_the_log_knows_also_after_its_stream_was_killed(
    worker: VllmWorker,
) -> None:
    engine = worker.engine

    def knows_all() -> bool:
        return feed.flowing and index.known == set(engine.cache_log._index)

    async def serve(port: int = 0) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        service = CacheFeedService(engine.cache_log, engine.info.incarnation)
        worker_pb2_grpc.add_CacheFeedServicer_to_server(service, server)
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        return server, port

    server, port = await serve()
    index = Index()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        feed = CacheFeed(channel, index, engine.info.incarnation, "r")
        for i in range(6):
            await cached_tokens(engine, greedy(tokens(500, f"fed {i}"), 1))
        await until(knows_all)
        await server.stop(grace=0)
        await until(lambda: not feed.flowing)
        for i in range(6, 12):
            await cached_tokens(engine, greedy(tokens(500, f"fed {i}"), 1))
        server, port = await serve(port)
        await until(knows_all)
        assert feed.num_resets == 1
        await feed.close()
    await server.stop(grace=0)


@asynccontextmanager
async def published(kept_batches: int) -> AsyncIterator[tuple[KvEventReader, Callable[[int], None]]]:
    """A reader that is not started yet, and vLLM's own publisher: of one block a batch, by its number."""
    reader = KvEventReader(kept_batches=kept_batches)
    config = reader.config()
    publisher = theirs.ZmqEventPublisher(
        0, config.endpoint, config.replay_endpoint, config.buffer_steps, config.hwm
    )

    def publish(i: int) -> None:
        stored = theirs.BlockStored(
            block_hashes=[i], parent_block_hash=None, token_ids=[i] * 4, block_size=4, lora_id=None,
            medium=theirs.MEDIUM_GPU, lora_name=None, group_idx=0, kv_cache_spec_kind="full_attention",
        )  # fmt: skip
        publisher.publish(theirs.KVEventBatch(ts=0.0, events=[stored]))

    try:
        yield reader, publish
    finally:
        await asyncio.to_thread(publisher.shutdown)
        reader.close()


def block(i: int) -> int:
    return int(chain_states(root_state(model="m"), [i] * 4, 4)[0])


async def test_batches_from_before_the_reader_came_are_sent_again() -> None:
    async with published(kept_batches=100) as (reader, publish):
        for i in range(50):
            publish(i)
        await asyncio.sleep(1.0)
        reader.start(model="m", block_size_tokens=4)
        await asyncio.sleep(1.0)
        publish(50)
        await until(lambda: len(reader.log) == 51)
        publish(51)
        await until(lambda: block(51) in reader.log)
        assert all(block(i) in reader.log for i in range(52))
        assert reader.num_lost == 0


async def test_batches_lost_for_good_clear_the_log_and_it_goes_on() -> None:
    async with published(kept_batches=3) as (reader, publish):
        for i in range(50):
            publish(i)
        await asyncio.sleep(1.0)
        reader.start(model="m", block_size_tokens=4)
        await asyncio.sleep(1.0)
        publish(50)
        await until(lambda: block(50) in reader.log)
        publish(51)
        await until(lambda: block(51) in reader.log)
        assert len(reader.log) == 2
        assert reader.num_lost == 1
        assert reader.log.since(0).reset


async def test_a_reader_leaves_nothing_behind() -> None:
    async with published(kept_batches=3) as (reader, _):
        reader.start(model="m", block_size_tokens=4)
        directory = reader._directory.path
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not directory.exists()
    reader.close()


async def test_the_events_of_vllm_are_those_that_are_read() -> None:
    for name in ("BlockStored", "BlockRemoved", "AllBlocksCleared"):
        assert set(getattr(ours, name).__struct_fields__) <= set(getattr(theirs, name).__struct_fields__)
    stored = theirs.BlockStored(
        block_hashes=[7], parent_block_hash=None, token_ids=[1, 2], block_size=2, lora_id=None,
        medium=theirs.MEDIUM_GPU, lora_name="a", extra_keys=[("a", ("image", 3), "salt")],
        group_idx=0, kv_cache_spec_kind="full_attention",
    )  # fmt: skip
    batch = theirs.KVEventBatch(
        ts=0.0,
        events=[stored, theirs.BlockRemoved(block_hashes=[b"7"], medium=None), theirs.AllBlocksCleared()],
        data_parallel_rank=0,
    )
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=ours.KVEventBatch).events
    assert read[0] == ours.BlockStored(
        block_hashes=[7], token_ids=[1, 2], block_size=2, medium="GPU", lora_name="a",
        extra_keys=[["a", ["image", 3], "salt"]], group_idx=0, kv_cache_spec_kind="full_attention",
    )  # fmt: skip
    assert read[1] == ours.BlockRemoved(block_hashes=[b"7"])
    assert read[2] == ours.AllBlocksCleared()
