"""From vLLM's KV cache events to the names of blocks that the rest of Baton knows.

vLLM names a block by a hash of its own; its events carry the tokens too, so each stored block gets the
state of ``core.prompt_blocks`` here, and an event of its removal is looked up by the hash.
"""

from __future__ import annotations

from typing import Any

import msgspec

from core.prompt_blocks import chain_states, root_state
from engine.cache_log import CacheChange

BlockHash = int | bytes


class BlockStored(msgspec.Struct, tag=True, gc=False):
    """As vllm/distributed/kv_events.py has it; fields that are not needed here are not decoded."""

    block_hashes: list[BlockHash]
    token_ids: list[int]
    block_size: int
    parent_block_hash: BlockHash | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    pass


class KVEventBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


_DEVICE = (None, "GPU")
"""vLLM calls the memory of any device, a CPU's too, GPU; copies in other tiers are not followed."""
_WHOLE_CONTEXT = (None, "full_attention", "mla_attention", "sink_full_attention")
"""Kinds of layers whose blocks all have to be there for a hit."""
_decoder = msgspec.msgpack.Decoder(KVEventBatch)


class CachedBlocks:
    """The states of the blocks an engine has cached, by the hashes it calls them.

    Left out, with all that follows them in their prompts: blocks behind an unknown one, blocks with
    images or embeddings in them, and blocks of another size than ``block_size_tokens``. Of models with
    several groups of layers, the first group that attends to the whole context is followed.

    Args:
        model: served model name, which the states cover.
    """

    def __init__(self, *, model: str, block_size_tokens: int) -> None:
        self._model = model
        self._block_size_tokens = block_size_tokens
        self._states: dict[BlockHash, int] = {}
        self._more_copies: dict[BlockHash, int] = {}
        """Blocks beyond the first that hold the same content: the engine tells of each."""
        self._group: int | None = None

    def __len__(self) -> int:
        return len(self._states)

    def apply(self, payload: bytes) -> list[CacheChange]:
        """Takes one published batch.

        Returns:
            What it means for the cache, in order, like changes joined.

        Raises:
            msgspec.DecodeError: it is not what vLLM publishes.
        """
        changes: list[CacheChange] = []
        for event in _decoder.decode(payload).events:
            if isinstance(event, BlockStored):
                _add(changes, CacheChange(kind="store", states=self._store(event)))
            elif isinstance(event, BlockRemoved):
                _add(changes, CacheChange(kind="evict", states=self._remove(event)))
            else:
                changes.append(self.clear())
        return changes

    def clear(self) -> CacheChange:
        """Forgets every block."""
        self._states.clear()
        self._more_copies.clear()
        return CacheChange(kind="clear", states=[])

    def _store(self, event: BlockStored) -> list[int]:
        """States that were not there before."""
        size, hashes = self._block_size_tokens, event.block_hashes
        if event.medium not in _DEVICE or event.kv_cache_spec_kind not in _WHOLE_CONTEXT:
            return []
        if self._group is None:
            self._group = event.group_idx
        # Fewer hashes than the tokens make: some blocks are not cached, and nothing says which.
        is_whole = event.block_size == size and len(event.token_ids) == size * len(hashes)
        if event.group_idx != self._group or not is_whole:
            return []
        num_plain, salt = _read_extra_keys(event)
        if event.parent_block_hash is None:
            parent: int | None = root_state(model=self._model, adapter=event.lora_name or "", salt=salt)
        else:
            parent = self._states.get(event.parent_block_hash)
        if parent is None or not num_plain:
            return []
        states = chain_states(parent, event.token_ids[: num_plain * size], size).tolist()
        new = []
        for block_hash, state in zip(hashes, states, strict=False):
            if block_hash in self._states:
                self._more_copies[block_hash] = self._more_copies.get(block_hash, 0) + 1
            else:
                self._states[block_hash] = state
                new.append(state)
        return new

    def _remove(self, event: BlockRemoved) -> list[int]:
        """States whose last copy went."""
        if event.medium not in _DEVICE or event.group_idx != self._group:
            return []
        gone = []
        for block_hash in event.block_hashes:
            if num_more := self._more_copies.pop(block_hash, 0):
                if num_more > 1:
                    self._more_copies[block_hash] = num_more - 1
            elif (state := self._states.pop(block_hash, None)) is not None:
                gone.append(state)
        return gone


def _read_extra_keys(event: BlockStored) -> tuple[int, str]:
    """How many blocks from the first one are text only, and the cache salt, which the first one names."""
    num_blocks = len(event.block_hashes)
    if event.extra_keys is None:
        return num_blocks, ""
    salt = ""
    for i, extra_keys in enumerate(event.extra_keys):
        keys = list(extra_keys or ())
        if event.lora_name is not None and keys and keys[0] == event.lora_name:
            del keys[0]
        if i == 0 and event.parent_block_hash is None and len(keys) == 1 and isinstance(keys[0], str):
            salt = keys.pop()
        if keys:
            return i, salt
    return min(num_blocks, len(event.extra_keys)), salt


def _add(changes: list[CacheChange], change: CacheChange) -> None:
    if not change.states:
        return
    if changes and changes[-1].kind == change.kind:
        changes[-1].states.extend(change.states)
    else:
        changes.append(change)
