"""A router's index says what the worker's log says, whatever becomes of the stream between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest

from baton_proto import worker_pb2, worker_pb2_grpc
from engine.cache_log import CacheLog
from engine.cache_service import CacheFeedService
from router.cache_feed import CacheFeed, States

GATHER_S = 0.01


class Index:
    """What one router knows."""

    def __init__(self) -> None:
        self.known: dict[str, set[int]] = {}
        self.calls: list[str] = []
        self.broken = False

    def replace(self, incarnation: str, states: States) -> None:
        self._call("replace")
        self.known[incarnation] = set(states.tolist())

    def store(self, incarnation: str, states: States) -> None:
        self._call("store")
        self.known[incarnation] |= set(states.tolist())

    def evict(self, incarnation: str, states: States) -> None:
        self._call("evict")
        self.known[incarnation] -= set(states.tolist())

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.broken:
            self.broken = False
            raise RuntimeError("the index failed")


class Worker:
    """A feed service on a port that stays the same from one server to the next."""

    def __init__(self, service: worker_pb2_grpc.CacheFeedServicer) -> None:
        self.service = service
        self._port = 0

    async def serve(self) -> None:
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_CacheFeedServicer_to_server(self.service, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(grace=0)

    @asynccontextmanager
    async def followed_by(self, index: Index, incarnation: str = "e1") -> AsyncIterator[CacheFeed]:
        options = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=options) as channel:
            feed = CacheFeed(channel, index, incarnation, "r")
            try:
                yield feed
            finally:
                await feed.close()


@asynccontextmanager
async def serving(service: worker_pb2_grpc.CacheFeedServicer) -> AsyncIterator[Worker]:
    worker = Worker(service)
    await worker.serve()
    try:
        yield worker
    finally:
        await worker.stop()


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  the index says nothing when it changes
            await asyncio.sleep(0.005)


@pytest.fixture
def log() -> CacheLog:
    return CacheLog(max_changes=8)


@pytest.fixture
def index() -> Index:
    return Index()


async def test_the_index_begins_with_all_there_is_and_follows(log: CacheLog, index: Index) -> None:
    log.store([1, 2, 3])
    async with (
        serving(CacheFeedService(log, "e1", gather_s=GATHER_S)) as worker,
        worker.followed_by(index) as feed,
    ):
        await until(lambda: feed.flowing)
        assert index.known == {"e1": {1, 2, 3}}
        log.evict([1])
        log.store([4])
        await until(lambda: index.known == {"e1": {2, 3, 4}})
        log.clear()
        await until(lambda: index.known == {"e1": set()})
        assert index.calls == ["replace", "evict", "store", "replace"]
    assert not feed.flowing


async def test_an_empty_cache_is_known_to_be_empty(log: CacheLog, index: Index) -> None:
    async with serving(CacheFeedService(log, "e1")) as worker, worker.followed_by(index) as feed:
        await until(lambda: feed.flowing)
        assert index.known == {"e1": set()}


async def test_changes_that_come_together_are_told_together(log: CacheLog, index: Index) -> None:
    async with (
        serving(CacheFeedService(log, "e1", gather_s=0.1)) as worker,
        worker.followed_by(index) as feed,
    ):
        await until(lambda: feed.flowing)
        for state in range(6):
            log.store([state])
            await asyncio.sleep(0)
        log.evict([5])
        await until(lambda: index.known == {"e1": {0, 1, 2, 3, 4}})
        assert index.calls == ["replace", "store"]


async def test_a_broken_stream_goes_on_where_it_was(log: CacheLog, index: Index) -> None:
    log.store([1])
    async with (
        serving(CacheFeedService(log, "e1", gather_s=GATHER_S)) as worker,
        worker.followed_by(index) as feed,
    ):
        await until(lambda: feed.flowing)
        await worker.stop()
        await until(lambda: not feed.flowing)
        assert index.known == {"e1": {1}}, "what was known is kept while the worker is out of reach"
        log.store([2])
        await worker.serve()
        await until(lambda: feed.flowing)
        assert index.known == {"e1": {1, 2}}
        assert feed.num_resets == 1


async def test_a_router_that_was_away_too_long_gets_a_snapshot(log: CacheLog, index: Index) -> None:
    async with (
        serving(CacheFeedService(log, "e1", gather_s=GATHER_S)) as worker,
        worker.followed_by(index) as feed,
    ):
        await until(lambda: feed.flowing)
        await worker.stop()
        await until(lambda: not feed.flowing)
        log.store(range(100))
        log.evict(range(50))
        await worker.serve()
        await until(lambda: feed.flowing)
        assert index.known == {"e1": set(range(50, 100))}
        assert feed.num_resets == 2


async def test_a_router_that_reads_slowly_gets_a_snapshot_and_no_queue(log: CacheLog) -> None:
    service = CacheFeedService(log, "e1", gather_s=0.0)
    deltas = service.WatchCache(worker_pb2.WatchCacheRequest(incarnation="e1"), None)
    assert (await anext(deltas)).reset
    log.store([1])
    assert not (await anext(deltas)).reset
    for state in range(1000):  # while the last delta has not left
        log.store([state])
    late = await anext(deltas)
    assert late.reset
    assert len(late.stored) == 1000 * 8
    await deltas.aclose()
    assert not log._listeners


async def test_another_engine_start_is_refused_until_the_feed_is_closed(log: CacheLog, index: Index) -> None:
    log.store([1])
    async with serving(CacheFeedService(log, "e2")) as worker, worker.followed_by(index, "e1") as feed:
        await asyncio.sleep(0.5)
        assert not feed.flowing
        assert index.known == {}


async def test_an_engine_that_cannot_tell_is_asked_once(index: Index) -> None:
    async with serving(CacheFeedService(None, "e1")) as worker, worker.followed_by(index) as feed:
        await until(feed._task.done)
        assert not feed.flowing
        assert index.known == {}


async def test_an_index_that_fails_gets_everything_again(log: CacheLog, index: Index) -> None:
    log.store([1])
    async with (
        serving(CacheFeedService(log, "e1", gather_s=GATHER_S)) as worker,
        worker.followed_by(index) as feed,
    ):
        await until(lambda: feed.flowing)
        index.broken = True
        log.store([2])
        await until(lambda: index.known == {"e1": {1, 2}})
        assert feed.num_resets == 2


class Forgetful(worker_pb2_grpc.CacheFeedServicer):
    """Sends a delta that does not follow the one before; then what it is asked for."""

    def __init__(self) -> None:
        self.asked_from: list[int | None] = []

    async def WatchCache(
        self, message: worker_pb2.WatchCacheRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.CacheDelta]:
        self.asked_from.append(message.known_seq if message.HasField("known_seq") else None)
        one, two, three = ((n).to_bytes(8, "little") for n in (1, 2, 3))
        yield worker_pb2.CacheDelta(reset=True, seq=1, stored=one)
        if len(self.asked_from) == 1:
            yield worker_pb2.CacheDelta(after_seq=2, seq=3, stored=three)
        else:
            yield worker_pb2.CacheDelta(after_seq=1, seq=3, stored=two + three)
        await asyncio.Event().wait()


async def test_a_gap_in_the_numbers_asks_for_everything_again(index: Index) -> None:
    service = Forgetful()
    async with serving(service) as worker, worker.followed_by(index):
        await until(lambda: index.known.get("e1") == {1, 2, 3})
        assert service.asked_from == [None, None]
