"""Reads that outlive their request, and the blocks that are kept for them."""

from __future__ import annotations

from types import SimpleNamespace

from kv_transfer.stalled_reads import HeldBlocks, StalledReads


class Pool:
    """Counts references as vLLM's block pool does."""

    def __init__(self) -> None:
        self.references: dict[str, int] = {"a": 1, "b": 1}

    def touch(self, blocks: list[str]) -> None:
        for block in blocks:
            self.references[block] += 1

    def free_blocks(self, blocks: list[str]) -> None:
        for block in blocks:
            self.references[block] -= 1


def held(pool: Pool) -> HeldBlocks:
    blocks = HeldBlocks()
    of_request = SimpleNamespace(blocks=(["a"], ["b"]))
    blocks.bind(SimpleNamespace(block_pool=pool, get_blocks=lambda request_id: of_request))
    return blocks


def test_a_read_with_several_handles_ends_with_the_last_one() -> None:
    done: set[int] = set()
    asked: list[int] = []

    def has_ended(request_id: str, handle: int) -> bool:
        asked.append(handle)
        return handle in done

    reads = StalledReads(has_ended)
    reads.add("r", "peer", [1, 2])

    assert reads.take_ended() == []
    done.add(1)
    assert reads.take_ended() == []
    assert reads.engines == {"peer"}
    asked.clear()
    done.add(2)
    assert reads.take_ended() == ["r"]
    assert asked == [2]
    assert reads.take_ended() == []
    assert reads.engines == set()


def test_a_peer_is_stalled_as_long_as_one_read_from_it_is() -> None:
    done: set[int] = set()
    reads = StalledReads(lambda request_id, handle: handle in done)
    reads.add("r", "peer", [1])
    reads.add("s", "peer", [2])
    reads.add("t", "other", [3])

    done.update({1, 3})

    assert sorted(reads.take_ended()) == ["r", "t"]
    assert reads.engines == {"peer"}


def test_blocks_are_held_after_their_request_has_given_them_up() -> None:
    pool = Pool()
    blocks = held(pool)
    assert not blocks

    blocks.hold("r")
    pool.free_blocks(["a", "b"])  # as the scheduler does then

    assert blocks
    assert pool.references == {"a": 1, "b": 1}
    blocks.let_go("r")
    assert pool.references == {"a": 0, "b": 0}
    assert not blocks


def test_blocks_are_held_until_every_rank_has_read() -> None:
    pool = Pool()
    blocks = held(pool)
    blocks.hold("r")
    blocks.hold("r")
    pool.free_blocks(["a", "b"])

    blocks.let_go("r")

    assert pool.references == {"a": 1, "b": 1}
    assert blocks
    blocks.let_go("r")
    assert pool.references == {"a": 0, "b": 0}
    assert not blocks
