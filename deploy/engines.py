"""The engine a worker's settings ask for."""

from __future__ import annotations

import uuid

from core.performance_model import LinearStepTime
from core.worker_events import WorkerModelConfig
from deploy.settings import CONNECTOR_CLASS, CONNECTOR_MODULE, STEP_METER, WORKER_EXTENSION, WorkerSettings
from engine.base import Engine
from engine.mock_engine import MockEngine, MockEngineConfig
from engine.vllm_engine import VllmEngine
from engine.vllm_start import VllmEngineSpec
from kv_transfer.params import NUM_PINNED_STAT, STEP_METER_OPTION, STEPS_STAT
from kv_transfer.peer import KvPeerAddress, free_port


async def start_engine(settings: WorkerSettings, host: str) -> tuple[Engine, KvPeerAddress]:
    """Starts an engine and says where its KV side channel listens.

    Args:
        host: this node's address, for the side channel.

    Raises:
        core.errors.StartupError: it failed or took too long.
    """
    incarnation = uuid.uuid4().hex
    if settings.engine == "mock":
        return _mock(settings, incarnation), KvPeerAddress(incarnation, host, 0, 1)
    port = free_port(host)
    engine = await VllmEngine.start(
        VllmEngineSpec(
            incarnation=incarnation,
            model=settings.model,
            model_path=settings.model_path,
            revision=settings.revision,
            engine_args=settings.engine_args,
            lora_modules=settings.adapters,
            connector_class=CONNECTOR_CLASS,
            connector_module=CONNECTOR_MODULE,
            worker_extension=WORKER_EXTENSION,
            kv_buffer_device=settings.kv_buffer_device,
            connector_options={**settings.connector_options, STEP_METER_OPTION: STEP_METER},
            lease_s=settings.lease_s,
            side_channel_host=host,
            side_channel_port=port,
            num_pinned_stat=NUM_PINNED_STAT,
            steps_stat=STEPS_STAT,
            startup_timeout_s=settings.startup_timeout_s,
            kv_events=settings.kv_events,
        )
    )
    return engine, KvPeerAddress(incarnation, host, port, engine.info.tp_size)


def _mock(settings: WorkerSettings, incarnation: str) -> MockEngine:
    mock = settings.mock
    return MockEngine(
        MockEngineConfig(
            incarnation=incarnation,
            model=settings.model,
            worker=WorkerModelConfig(
                num_kv_blocks=mock["kv_blocks"],
                block_size_tokens=mock["block_size_tokens"],
                lease_s=settings.lease_s,
            ),
            step_time=LinearStepTime(
                prefill_ms_per_token2=0.0,
                prefill_ms_per_token=mock["prefill_ms_per_1k_tokens"] / 1000,
                prefill_base_ms=0.0,
                decode_base_ms=mock["decode_step_ms"],
                decode_ms_per_seq=0.0,
                decode_ms_per_kv_token=0.0,
            ),
        )
    )
