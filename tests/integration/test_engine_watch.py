"""A real engine that is stopped, goes on and is killed, as the worker around it sees it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deploy.engine_watch import watch_engine
from deploy.hang_watch import HangWatch
from engine.vllm_engine import VllmEngine
from tests.integration.engine_process import ENVIRONMENT, engine_spec

pytestmark = pytest.mark.engine

LIMIT_S = 4.0


async def until(condition: Callable[[], bool], limit_s: float) -> float:
    """Seconds until it holds."""
    began_s = time.monotonic()
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)
    return time.monotonic() - began_s


async def test_an_engine_that_hangs_is_noticed_comes_back_unharmed_and_is_missed_when_it_dies(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {**ENVIRONMENT, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}.items():
        monkeypatch.setenv(variable, value)
    engine = await VllmEngine.start(engine_spec(str(model_path)))
    process = max(psutil.Process().children(recursive=True), key=lambda child: child.memory_info().rss)
    hang = HangWatch(LIMIT_S)
    watching = asyncio.create_task(watch_engine(engine, hang, lambda: None))
    await asyncio.sleep(2.5)
    assert hang.silent_s < 1.0
    process.send_signal(signal.SIGSTOP)
    hung_after_s = await until(lambda: hang.hung, 20.0)
    lost_after_s = hung_after_s + await until(lambda: hang.lost, 40.0)  # calls have timed out meanwhile
    process.send_signal(signal.SIGCONT)
    back_after_s = await until(lambda: not hang.hung, 20.0)
    await engine.settle()
    process.send_signal(signal.SIGKILL)
    dead_after_s = await until(watching.done, 20.0)
    print({"hung": hung_after_s, "lost": lost_after_s, "back": back_after_s, "dead": dead_after_s})
    assert hung_after_s >= LIMIT_S - 0.5
    assert dead_after_s < 10.0
    await watching
    await engine.shutdown(timeout_s=1.0)
