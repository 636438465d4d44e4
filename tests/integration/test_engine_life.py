"""An engine's start and end: limits, one clear message, and no child left behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from core.errors import StartupError
from engine.vllm_engine import VllmEngine
from tests.integration.engine_process import ENVIRONMENT, READY, engine_spec
from tests.integration.server_process import ServerProcess

pytestmark = pytest.mark.engine


def test_the_engine_process_dies_with_its_parent(model_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.engine_process", str(model_path)]
    owner = ServerProcess("the engine's owner", command, ENVIRONMENT, tmp_path / "engine.log")
    try:
        owner.wait_until(lambda: READY in owner.log_tail(), 120)
        line = next(line for line in owner.log_tail().splitlines() if line.startswith(READY))
        children = [psutil.Process(int(pid)) for pid in line.removeprefix(READY).split()]
        assert any(child.memory_info().rss > 500 << 20 for child in children), "none of them is an engine"
        os.kill(owner.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    finally:
        owner.stop(grace_s=5)


def test_a_start_that_takes_too_long_ends_and_says_in_which_phase_it_was(
    model_path: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.integration.engine_process", str(model_path), "0.5"]
    owner = ServerProcess("the engine's owner", command, ENVIRONMENT, tmp_path / "engine.log")
    try:
        with pytest.raises(RuntimeError, match=r"not ready after 0 s, still in phase '\w+'"):
            owner.wait_until(lambda: READY in owner.log_tail(), 60)
    finally:
        owner.stop(grace_s=5)


async def test_a_model_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="engine failed in phase"):
        await VllmEngine.start(engine_spec(str(tmp_path / "nothing")))


async def test_pipeline_parallel_engines_are_refused_before_they_start(model_path: Path) -> None:
    spec = engine_spec(str(model_path))
    arguments = {**spec.engine_args, "pipeline_parallel_size": 2}
    with pytest.raises(StartupError, match="pipeline_parallel_size"):
        await VllmEngine.start(engine_spec(str(model_path), engine_args=arguments))
