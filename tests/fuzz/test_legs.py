"""A worker's gRPC services on the mock engine: any call, in any order, leaves a worker as good as new."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton_proto import worker_pb2_grpc
from core.types import Role
from engine.cache_log import CacheLog
from engine.cache_service import CacheFeedService
from tests.fuzz.calls import CALLS, Call
from tests.fuzz.fuzzed_worker import FuzzedWorker
from tests.fuzz.loop_thread import LoopThread
from tests.fuzz.profiles import quick, thorough
from tests.integration.mock_workers import MockWorker


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()
    assert not thread.unhandled


@pytest.fixture(scope="module")
def fuzzed(loop: LoopThread) -> Iterator[FuzzedWorker]:
    async def start() -> tuple[MockWorker, FuzzedWorker]:
        worker = MockWorker(
            Role.DECODE,
            None,
            30.0,
            engine={"time_scale": 0.0, "max_model_len": 1024, "decode_steps_per_wake": 8},
        )
        log = CacheLog()
        log.store([1, 2, 3])
        worker_pb2_grpc.add_CacheFeedServicer_to_server(CacheFeedService(log, "fuzzed"), worker.server)
        await worker.start()
        fuzzed = FuzzedWorker(worker, empty_within_s=5.0)
        await fuzzed.open()
        return worker, fuzzed

    async def stop(worker: MockWorker, fuzzed: FuzzedWorker) -> None:
        await fuzzed.close()
        await worker.stop()

    worker, fuzzed = loop.run(start())
    yield fuzzed
    loop.run(stop(worker, fuzzed))


@quick(150)
@given(CALLS, st.booleans())
def test_calls_of_any_kind_leave_nothing_behind(
    loop: LoopThread, fuzzed: FuzzedWorker, calls: list[Call], at_once: bool
) -> None:
    loop.run(fuzzed.survive(calls, at_once=at_once), timeout_s=40.0)


@thorough(1000)
@given(CALLS, st.booleans())
def test_calls_of_any_kind_leave_nothing_behind_at_length(
    loop: LoopThread, fuzzed: FuzzedWorker, calls: list[Call], at_once: bool
) -> None:
    loop.run(fuzzed.survive(calls, at_once=at_once), timeout_s=40.0)
