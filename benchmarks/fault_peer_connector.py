"""vLLM's NIXL connector for the peers' engines, as it is but for the cores it takes.

NIXL's progress thread spins, and the connector pins the engine to one core: on a machine with fewer cores
than engines they would be in each other's way. Baton's engines poll instead, so the peers' do here too.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from kv_transfer.nixl_agent import make_polled_agent

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class _PolledWorker(NixlPullConnectorWorker):
    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        affinity = os.sched_getaffinity(0)
        super().__init__(vllm_config, engine_id, kv_cache_config)
        os.sched_setaffinity(0, affinity)
        self.nixl_wrapper: Any = make_polled_agent(
            base_worker.NixlWrapper,
            base_worker.nixl_agent_config,
            num_threads=vllm_config.kv_transfer_config.get_from_extra_config("num_threads", 4),
            backends=self.nixl_backends,
        )


class NixlConnector(NixlPullConnector):
    """The class vLLM instantiates, by this module's path; its name is what Ray Serve LLM goes by."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        self.connector_scheduler = self.connector_worker = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = NixlPullConnectorScheduler(
                vllm_config, self.engine_id, kv_cache_config
            )
        else:
            self.connector_worker = _PolledWorker(vllm_config, self.engine_id, kv_cache_config)
