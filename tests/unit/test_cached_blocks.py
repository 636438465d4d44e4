"""Events of vLLM's cache become states of our own chain, and of nothing that could mislead."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from core.prompt_blocks import chain_states, root_state
from engine.cache_log import CacheLog
from engine.cached_blocks import AllBlocksCleared, BlockRemoved, BlockStored, CachedBlocks, KVEventBatch

SIZE = 4
TOKENS = list(range(100, 124))
NUM_BLOCKS = len(TOKENS) // SIZE
HASHES = list(range(1, NUM_BLOCKS + 1))


def expected(salt: str = "", adapter: str = "") -> list[int]:
    return chain_states(root_state(model="m", adapter=adapter, salt=salt), TOKENS, SIZE).tolist()


def stored(start: int = 0, end: int = NUM_BLOCKS, **changes: Any) -> BlockStored:
    """The blocks ``start`` to ``end`` of one prompt."""
    fields = {
        "block_hashes": HASHES[start:end],
        "token_ids": TOKENS[start * SIZE : end * SIZE],
        "block_size": SIZE,
        "parent_block_hash": HASHES[start - 1] if start else None,
        "medium": "GPU",
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return BlockStored(**{**fields, **changes})


def removed(*hashes: int | bytes, **changes: Any) -> BlockRemoved:
    return BlockRemoved(**{"block_hashes": list(hashes), "medium": "GPU", "group_idx": 0, **changes})


class Engine:
    """The log of what an engine published."""

    def __init__(self) -> None:
        self.blocks = CachedBlocks(model="m", block_size_tokens=SIZE)
        self.log = CacheLog()

    def publish(self, *events: Any) -> None:
        batch = KVEventBatch(ts=0.0, events=list(events))
        self.log.apply(self.blocks.apply(msgspec.msgpack.encode(batch)))

    def holds(self, states: list[int]) -> bool:
        return len(self.log) == len(set(states)) and all(state in self.log for state in states)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.mark.parametrize("cut", range(1, NUM_BLOCKS))
def test_blocks_get_the_states_of_their_prompt_wherever_it_was_cut(engine: Engine, cut: int) -> None:
    engine.publish(stored(0, cut))
    engine.publish(stored(cut))
    assert engine.holds(expected())


def test_hashes_may_be_bytes(engine: Engine) -> None:
    names = [bytes([i]) * 32 for i in HASHES]
    engine.publish(
        stored(0, 3, block_hashes=names[:3]), stored(3, parent_block_hash=names[2], block_hashes=names[3:])
    )
    engine.publish(removed(names[1]))
    assert engine.holds(expected()[:1] + expected()[2:])


def test_what_is_removed_or_cleared_is_gone(engine: Engine) -> None:
    engine.publish(stored(), removed(HASHES[-1]), removed(HASHES[-2]))
    assert engine.holds(expected()[:-2])
    engine.publish(AllBlocksCleared())
    assert engine.holds([])
    assert len(engine.blocks) == 0


def test_content_in_two_blocks_is_there_until_both_are_removed(engine: Engine) -> None:
    engine.publish(stored(), stored(), stored())
    engine.publish(*(removed(name) for name in HASHES))
    engine.publish(*(removed(name) for name in HASHES))
    assert engine.holds(expected())
    engine.publish(*(removed(name) for name in HASHES))
    assert engine.holds([])
    engine.publish(stored(), *(removed(name) for name in HASHES))
    assert engine.holds([])


def test_salt_and_adapter_have_chains_of_their_own(engine: Engine) -> None:
    salted = {"block_hashes": [11, 12], "extra_keys": [["s"], None]}
    adapted = {"block_hashes": [21, 22], "lora_name": "a", "extra_keys": [["a"], ["a"]]}
    both = {"block_hashes": [31, 32], "lora_name": "a", "extra_keys": [["a", "s"], ["a"]]}
    engine.publish(stored(0, 2), stored(0, 2, **salted), stored(0, 2, **adapted), stored(0, 2, **both))
    chains = [expected(), expected(salt="s"), expected(adapter="a"), expected(salt="s", adapter="a")]
    assert engine.holds([state for chain in chains for state in chain[:2]])


def test_blocks_behind_an_unknown_one_are_left_out(engine: Engine) -> None:
    engine.publish(stored(2, 4))
    engine.publish(stored(4))
    engine.publish(removed(HASHES[2]))
    assert engine.holds([])


@pytest.mark.parametrize("key", [["image", 3], b"digest of an embedding", "a string that is no salt"])
def test_blocks_with_more_than_text_are_left_out_with_all_that_follow(engine: Engine, key: Any) -> None:
    engine.publish(stored(0, 4, extra_keys=[None, None, [key], None]), stored(4))
    assert engine.holds(expected()[:2])


def test_an_image_in_the_first_block_leaves_nothing(engine: Engine) -> None:
    engine.publish(stored(extra_keys=[["salt", ["image", 3]], *[None] * (NUM_BLOCKS - 1)]))
    assert engine.holds([])


@pytest.mark.parametrize(
    "changes",
    [
        {"medium": "CPU"},
        {"group_idx": 1},
        {"kv_cache_spec_kind": "sliding_window"},
        {"block_size": 2 * SIZE},
        {"block_hashes": HASHES[1:]},
    ],
)
def test_blocks_of_another_kind_are_left_out(engine: Engine, changes: dict[str, Any]) -> None:
    engine.publish(stored(0, 1))
    engine.publish(stored(**changes))
    assert engine.holds(expected()[:1])


def test_removals_of_another_kind_remove_nothing(engine: Engine) -> None:
    engine.publish(stored(), removed(1, medium="CPU"), removed(1, group_idx=1), removed(999))
    assert engine.holds(expected())


def test_what_is_not_an_event_is_refused(engine: Engine) -> None:
    with pytest.raises(msgspec.DecodeError):
        engine.blocks.apply(b"\xc0")


@pytest.mark.slow
def test_the_cost_of_a_block() -> None:
    """Steps of 512 blocks of 16 tokens into a cache that is full, and the rate of decode: one at a time."""
    for num_per_event, num_events in ((512, 200), (1, 20_000)):
        blocks, log = CachedBlocks(model="m", block_size_tokens=16), CacheLog()
        payloads = []
        for step in range(num_events):
            names = range(step * num_per_event, (step + 1) * num_per_event)
            event = BlockStored(
                block_hashes=[name + (1 << 60) for name in names],
                token_ids=[(7 * name + i) % 128_000 for name in names for i in range(16)],
                block_size=16,
            )
            evicted = [removed(name + (1 << 60) - 10_000, medium=None, group_idx=None) for name in names]
            payloads.append(msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=[*evicted, event])))
        read_s = log_s = 0.0
        for payload in payloads:
            start_s = time.perf_counter()
            changes = blocks.apply(payload)
            middle_s = time.perf_counter()
            log.apply(changes)
            read_s += middle_s - start_s
            log_s += time.perf_counter() - middle_s
        num_blocks = num_events * num_per_event
        print(
            f"{num_per_event} blocks an event, one stored and one removed: reader"
            f" {read_s / num_blocks * 1e6:.2f} us, log {log_s / num_blocks * 1e6:.2f} us;"
            f" {num_blocks / (read_s + log_s):.0f} blocks/s"
        )
        assert read_s + log_s < 20.0
