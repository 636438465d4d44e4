"""Calls of an engine process that hangs, and dies meanwhile."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import WorkerLost
from engine.vllm_engine import VllmEngine
from engine.vllm_start import LoadGauge


class StuckLlm:
    """As vLLM's AsyncLLM of an engine that hangs: what was asked before it died stays open."""

    vllm_config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 10))
    errored = False

    async def collective_rpc(self, method: str, args: Any) -> None:
        await asyncio.Event().wait()


async def test_a_call_ends_when_its_engine_dies() -> None:
    llm: Any = StuckLlm()
    info: Any = None
    engine = VllmEngine(llm, info, LoadGauge(), None, ThreadPoolExecutor(1))
    call = asyncio.create_task(engine.settle())
    await asyncio.sleep(0.05)
    assert not call.done()
    llm.errored = True
    async with asyncio.timeout(5):
        with pytest.raises(WorkerLost, match="did not answer baton_settle"):
            await call
