"""The router's OpenAI application over HTTP, with its relay, in front of mock workers of this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from prometheus_client import CollectorRegistry

from core.types import Role
from engine.base import EngineDelta, EngineRequest, LogprobRows
from engine.mock_engine import MockEngine
from engine.vllm_codec import RequestDecoder
from router.admin_api import admin_routes
from router.app import FrontDoor, build_openai_app, front_end_config, parse_front_end_args
from router.engine_client import RelayEngineClient
from router.planner_api import planner_routes
from router.trace import TraceLog
from router.tracker import RequestTracker
from telemetry.router_metrics import RouterMetrics
from telemetry.slo import SloTargets
from tests.fuzz.loop_thread import LoopThread
from tests.integration.mock_workers import MODEL, MockCluster, MockWorker
from tests.integration.server_process import HOST, free_port

MAX_MODEL_LEN = 256
VOCABULARY = 2048
_ENGINE_ARGS = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "reasoning_parser": "deepseek_v3",
    "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"},
}
_ARGS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
_WORKER = {
    "time_scale": 0.0,
    "decode_steps_per_wake": 8,
    "max_model_len": MAX_MODEL_LEN,
    "token_ids": (300, 2000),
}


class FrontEnd:
    """One router with two workers, on the loop of a thread."""

    def __init__(self, loop: LoopThread, model_path: Path, adapter_path: Path) -> None:
        self._loop = loop
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.openapi: dict[str, Any] = {}
        loop.run(self._open(model_path, adapter_path), timeout_s=100.0)

    async def _open(self, model_path: Path, adapter_path: Path) -> None:
        self.cluster = cluster = MockCluster(1, 1, engine=_WORKER)
        for worker in cluster.workers:
            worker.engine.generate = _with_logprobs(worker.engine)
        await cluster.__aenter__()
        args = parse_front_end_args(
            model_path=str(model_path),
            served_name=MODEL,
            revision=None,
            engine_args=_ENGINE_ARGS,
            adapters={"adapted": str(adapter_path)},
            extra=_ARGS,
        )
        traces = TraceLog()
        self.tracker = RequestTracker(
            RouterMetrics(CollectorRegistry()), traces, cluster.clock, cluster.traffic
        )
        self.client = RelayEngineClient(
            front_end_config(args),
            MODEL,
            cluster.relay,
            self.tracker,
            cluster.clock,
            "fuzzed-router",
            SloTargets(ttft_s=1.0, tpot_s=1.0),
        )
        app = await build_openai_app(self.client, args)
        app.include_router(admin_routes(cluster.view, traces, _no_targets, self.client.explain))
        app.include_router(planner_routes(_no_planner))
        self.openapi = app.openapi()
        self._server = uvicorn.Server(
            uvicorn.Config(FrontDoor(app), host=HOST, port=self.port, log_level="critical", lifespan="on")
        )
        self._serving = asyncio.create_task(self._server.serve())
        async with asyncio.timeout(20):
            while not self._server.started:  # noqa: ASYNC110  uvicorn has no event for it
                await asyncio.sleep(0.02)

    def close(self) -> None:
        self._loop.run(self._close(), timeout_s=30.0)

    async def _close(self) -> None:
        self._server.should_exit = True
        await self._serving
        self.client.shutdown()
        await self.cluster.__aexit__()

    def check_nothing_is_left(self, within_s: float = 5.0) -> None:
        """Fails unless every request that came has ended, here and on the workers, and its KV is free."""
        self._loop.run(self._wait_idle(within_s), timeout_s=within_s + 5.0)

    async def _wait_idle(self, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                while self._held():  # noqa: ASYNC110  nobody tells when a router becomes idle
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"left behind: {self._held()}") from None

    def _held(self) -> dict[str, Any]:
        held: dict[str, Any] = {
            "ongoing": self.tracker.num_ongoing,
            "relays": len(self.client._tasks),
            "detokenized": self.client._output_processor.get_num_unfinished_requests(),
        }
        for worker in self.cluster.workers:
            load = worker.engine.load()
            held |= {
                f"{worker.worker_id} inside": worker.gate.num_inside,
                f"{worker.worker_id} KV": load.kv_used_blocks,
                f"{worker.worker_id} pinned": load.num_pinned,
                f"{worker.worker_id} promised": worker.decode_leg._reservations.num_promised_tokens,
            }
        return {name: value for name, value in held.items() if value}

    def decode_workers(self) -> list[MockWorker]:
        return self.cluster.of(Role.DECODE)


async def _no_targets() -> list[dict[str, Any]]:
    return []


async def _no_planner(last: int, number: int | None, moves: bool) -> None:
    return None


def _with_logprobs(engine: MockEngine) -> Any:
    """The engine's ``generate``, which refuses what a real one does, with logprobs where asked for."""
    generate, decoder = engine.generate, RequestDecoder(VOCABULARY)

    async def generate_with_logprobs(request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        params, _ = decoder.decode(request)
        width = None if params.num_logprobs is None else 1 + max(params.num_logprobs, 0)
        prompt_width = None if params.prompt_logprobs is None else 1 + max(params.prompt_logprobs, 0)
        async for delta in generate(request):
            fields = {name: getattr(delta, name) for name in delta.__slots__}
            if width is not None:
                fields["logprobs"] = _rows(list(delta.token_ids), width)
            if prompt_width is not None and delta.num_cached_tokens is not None:
                fields["prompt_logprobs"] = _rows(request.prompt_token_ids[1:], prompt_width)
            yield EngineDelta(**fields)

    return generate_with_logprobs


def _rows(token_ids: list[int], width: int) -> LogprobRows:
    """The token itself and others of the vocabulary, all equally likely."""
    others = [[token, *((token + i) % VOCABULARY for i in range(1, width))] for token in token_ids]
    table = np.array(others, dtype=np.int32).reshape(len(token_ids), width)
    return LogprobRows(
        token_ids=table,
        logprobs=np.full(table.shape, -1.0, dtype=np.float32),
        ranks=np.ones(len(token_ids), dtype=np.int32),
    )
