"""The same calls against a worker on a real engine: it lives, and goes on to answer as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.tiny_model import make_tiny_model
from tests.fuzz.calls import CALLS, Call
from tests.fuzz.fuzzed_worker import FuzzedWorker
from tests.fuzz.loop_thread import LoopThread
from tests.fuzz.profiles import quick, thorough
from tests.integration.vllm_workers import vllm_worker

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

EXAMPLE_LIMIT_S = 60.0


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()
    assert not thread.unhandled


@pytest.fixture(scope="module")
def fuzzed(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FuzzedWorker]:
    model_path: Path = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    stack = AsyncExitStack()

    async def start() -> FuzzedWorker:
        worker = await stack.enter_async_context(
            vllm_worker("fuzzed", model_path, kv_events=True, enable_lora=True)
        )
        fuzzed = FuzzedWorker(worker, empty_within_s=10.0)
        await fuzzed.open()
        stack.push_async_callback(fuzzed.close)
        return fuzzed

    yield loop.run(start(), timeout_s=200.0)
    loop.run(stack.aclose(), timeout_s=60.0)


@quick(25)
@given(CALLS, st.booleans())
def test_calls_of_any_kind_leave_an_engine_alive_and_right(
    loop: LoopThread, fuzzed: FuzzedWorker, calls: list[Call], at_once: bool
) -> None:
    loop.run(fuzzed.survive(calls, at_once=at_once), timeout_s=EXAMPLE_LIMIT_S)


@thorough(150)
@given(CALLS, st.booleans())
def test_calls_of_any_kind_leave_an_engine_alive_and_right_at_length(
    loop: LoopThread, fuzzed: FuzzedWorker, calls: list[Call], at_once: bool
) -> None:
    loop.run(fuzzed.survive(calls, at_once=at_once), timeout_s=EXAMPLE_LIMIT_S)
