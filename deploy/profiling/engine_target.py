"""A fresh engine in this process, started from a configuration file's shape as a cluster starts it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping

from core.errors import ConfigError, WorkerLost
from core.performance_profile import TransferPoint
from deploy.config import load_config
from deploy.config_schema import BatonConfig, ModelConfig, ShapeConfig
from deploy.profiling.plan import WorkerLimits
from deploy.profiling.target import TargetFacts, greedy_params, next_request_id
from engine.base import Engine, EngineDelta, EngineRequest

_SHUTDOWN_S = 10.0
_SPAWN = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


class EngineTarget:
    """Runs prompts on an engine in this process.

    Args:
        timeout_s: longest wait for the next token.
    """

    def __init__(self, engine: Engine, limits: WorkerLimits, facts: TargetFacts, timeout_s: float) -> None:
        self._engine = engine
        self._limits = limits
        self._facts = facts
        self._timeout_s = timeout_s
        self._params = greedy_params()

    @property
    def limits(self) -> WorkerLimits:
        return self._limits

    @property
    def facts(self) -> TargetFacts:
        return self._facts

    async def prefill(self, prompt: list[int]) -> float:
        started_s = time.monotonic()
        async with contextlib.aclosing(self._deltas(prompt, max_tokens=1)) as deltas:
            async for delta in deltas:
                if delta.token_ids:
                    return delta.prefill_s or time.monotonic() - started_s
        raise WorkerLost("the engine ended a prompt without a token")

    async def decode(self, prompt: list[int], max_tokens: int) -> AsyncGenerator[int, None]:
        async with contextlib.aclosing(self._deltas(prompt, max_tokens)) as deltas:
            async for delta in deltas:
                yield len(delta.token_ids)

    async def transfer(self, prompt: list[int]) -> TransferPoint | None:
        return None  # one engine alone

    async def _deltas(self, prompt: list[int], max_tokens: int) -> AsyncGenerator[EngineDelta, None]:
        request = EngineRequest(
            request_id=next_request_id(),
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            sampling_params=self._params,
        )
        async with contextlib.aclosing(self._engine.generate(request)) as deltas:
            while True:
                try:
                    delta = await asyncio.wait_for(anext(deltas), self._timeout_s)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise WorkerLost(f"the engine gave no token for {self._timeout_s:.0f} s") from None
                yield delta


@contextlib.asynccontextmanager
async def fresh_engine(
    config_file: str, shape_name: str | None, accelerator: str | None, timeout_s: float
) -> AsyncIterator[EngineTarget]:
    """Starts one engine of a shape and ends it.

    Raises:
        ConfigError: the file is wrong, or has no such shape.
        core.errors.StartupError: the engine did not come up.
    """
    from deploy.config_checks import require_local_files
    from deploy.engines import start_engine
    from deploy.environment import worker_environment
    from deploy.settings import LOOPBACK, worker_settings

    config = load_config(config_file)
    require_local_files(config)
    model, shape = pick_shape(config, shape_name)
    settings = worker_settings(config, model, shape, cluster_key=os.urandom(32))
    started_s = time.monotonic()
    # The engine's processes inherit it; a Serve replica is born with it.
    with _environment({**_SPAWN, **worker_environment(shape)}):
        engine, _ = await start_engine(settings, LOOPBACK)
    startup_s = time.monotonic() - started_s
    try:
        info = engine.info
        limits = WorkerLimits(
            max_model_len=info.max_model_len,
            num_kv_blocks=info.num_kv_blocks,
            block_size_tokens=info.block_size_tokens,
            kv_bytes_per_token=info.bytes_per_block // info.block_size_tokens,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
        )
        facts = TargetFacts(
            model=model.name,
            accelerator=accelerator or _accelerator(shape),
            gpus_per_worker=0 if shape.gpus_per_worker == 0 else info.tp_size,
            source=f"measured by baton profile on a fresh engine, shape {shape.name}",
            startup_s=round(startup_s, 1),
        )
        yield EngineTarget(engine, limits, facts, timeout_s)
    finally:
        await engine.shutdown(timeout_s=_SHUTDOWN_S)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def pick_shape(config: BatonConfig, name: str | None) -> tuple[ModelConfig, ShapeConfig]:
    """The shape of that name, or the only one.

    Raises:
        ConfigError: there is none of that name, or no name and several shapes.
    """
    shapes = {shape.name: (model, shape) for model in config.models for shape in model.shapes}
    if name is None and len(shapes) == 1:
        return next(iter(shapes.values()))
    if name not in shapes:
        what = "name one of the shapes" if name is None else f"no shape {name!r}; there are"
        raise ConfigError(f"--shape: {what}: {', '.join(shapes)}")
    return shapes[name]


def _accelerator(shape: ShapeConfig) -> str:
    if shape.engine == "mock":
        return "mock"
    if shape.gpus_per_worker == 0:
        return "CPU"
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name(0))
