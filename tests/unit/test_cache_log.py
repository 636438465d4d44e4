"""The log of an engine's cache: whoever follows it, by whatever steps, knows what is resident."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cache_log import CacheLog, CacheNews

states_lists = st.lists(st.integers(0, 12), max_size=8)
changes = st.one_of(
    st.tuples(st.just("store"), states_lists),
    st.tuples(st.just("evict"), states_lists),
    st.tuples(st.just("clear"), st.just([])),
    st.tuples(st.just("read"), st.integers(0, 2)),
)


def unpack(data: bytes) -> list[int]:
    return np.frombuffer(data, dtype="<u8").tolist()


class Follower:
    """Who knows the cache from news alone."""

    def __init__(self) -> None:
        self.seq: int | None = None
        self.known: set[int] = set()

    def read(self, log: CacheLog) -> CacheNews:
        news = log.since(self.seq)
        stored, removed = unpack(news.stored), unpack(news.removed)
        assert len(set(stored)) == len(stored)
        if news.reset:
            assert not removed
            self.known = set(stored)
        else:
            assert news.after_seq == self.seq
            assert self.known.isdisjoint(stored), "told again of what it knew"
            assert self.known.issuperset(removed), "told of the end of what it never knew"
            self.known = (self.known - set(removed)) | set(stored)
        self.seq = news.seq
        return news


@given(st.lists(changes, max_size=40), st.integers(1, 16))
def test_followers_of_any_pace_know_what_is_resident(steps, max_changes: int) -> None:
    log = CacheLog(max_changes)
    followers = [Follower(), Follower(), Follower()]
    resident: set[int] = set()
    for kind, argument in steps:
        if kind == "read":
            followers[argument].read(log)
            assert followers[argument].known == resident
        elif kind == "store":
            log.store(argument)
            resident |= set(argument)
        elif kind == "evict":
            log.evict(argument)
            resident -= set(argument)
        else:
            log.clear()
            resident.clear()
        assert len(log) == len(resident)
        assert all(state in log for state in resident)
    for follower in followers:
        follower.read(log)
        assert follower.known == resident


def test_a_follower_within_the_log_gets_no_snapshot() -> None:
    log, follower = CacheLog(max_changes=4), Follower()
    assert follower.read(log).reset
    for state in range(100):
        log.store([state])
        assert not follower.read(log).reset
    log.store(range(200, 204))
    assert not follower.read(log).reset
    log.store(range(300, 309))
    assert follower.read(log).reset


def test_a_clear_is_a_reset_for_everyone() -> None:
    log, follower = CacheLog(), Follower()
    log.store([1, 2])
    follower.read(log)
    log.clear()
    log.store([2])
    assert follower.read(log).reset
    assert follower.known == {2}


def test_a_sequence_number_from_the_future_gets_a_snapshot() -> None:
    log = CacheLog()
    log.store([1])
    assert log.since(2).reset


def test_states_fill_all_64_bits() -> None:
    log = CacheLog()
    log.store([2**64 - 1])
    assert log.since(None).stored == b"\xff" * 8


def test_listeners_hear_every_change_until_they_leave() -> None:
    log, heard = CacheLog(), []
    unlisten = log.listen(lambda: heard.append(log.seq))
    log.store([1, 2])
    log.evict([1])
    log.clear()
    unlisten()
    log.store([3])
    assert heard == [2, 3, 4]


def test_memory_is_bounded_by_the_log_and_what_is_resident() -> None:
    log = CacheLog(max_changes=100)
    for state in range(10_000):
        log.store([state])
        log.evict([state - 10])
    news = log.since(log.seq - 100)
    assert not news.reset
    assert log.since(log.seq - 201).reset
    assert len(log) == 10


@pytest.mark.slow
def test_the_cost_of_a_block() -> None:
    """Not a limit to keep to, but far from what a step can afford it must not be."""
    log, num_blocks = CacheLog(), 100_000
    names = np.random.default_rng(0).integers(0, 2**63, num_blocks).tolist()
    start_s = time.perf_counter()
    log.store(names)
    store_s = time.perf_counter() - start_s
    log.since(None)
    snapshot_s = time.perf_counter() - start_s - store_s
    start_s = time.perf_counter()
    log.evict(names)
    evict_s = time.perf_counter() - start_s
    log.since(log.seq - 60_000)
    print(
        f"store {store_s / num_blocks * 1e6:.2f} us, evict {evict_s / num_blocks * 1e6:.2f} us a block,"
        f" snapshot {snapshot_s * 1e3:.2f} ms"
    )
    assert store_s + evict_s < 1.0
