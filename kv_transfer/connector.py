"""Baton's KV connector: vLLM's NIXL pull connector, made safe to point at anything.

What it adds, and why (``connector_scheduler`` and ``connector_worker`` have the two sides):

* A pull covers exactly the tokens the handle covers, so the prompt may be longer than the remote
  blocks (the first token was already sent); vLLM's own scheduler side asserts and the engine dies.
* Leases are checked by the puller before each read and at its end; a late read is a failed read, and
  its blocks are recomputed. vLLM's pull succeeds with whatever stands in the blocks by then.
* The request of a late read goes on in other blocks than those it reads into (``stalled_reads``).
* Anything unexpected in a pull fails that pull, never the engine.
* Each request's last output says what became of its pull (``params.REPORT_KEY``).
* Pinned KV can be released and its lease renewed from outside (``worker_extension``).
* A step meter given by name is shown each step when it is scheduled and when it is done.
* Peers that are gone can be forgotten; vLLM keeps the descriptors of all their blocks for an hour.
* On CPU: no spinning progress thread, no pinning of the engine's main thread to one core.
* The engine process dies with its parent.

Selected with ``kv_connector_module_path``; vLLM makes one instance for the scheduler and one in each
worker process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlBaseConnector,
    NixlPullConnector,
)

from kv_transfer.connector_scheduler import BatonConnectorScheduler
from kv_transfer.connector_stats import BatonConnectorStats
from kv_transfer.connector_worker import BatonConnectorWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent goes, however the parent goes."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)


class BatonConnector(NixlPullConnector):
    """The class vLLM instantiates, by this module's path."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        die_with_parent()
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = BatonConnectorScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = BatonConnectorWorker(vllm_config, self.engine_id, kv_cache_config)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        if self.connector_scheduler is not None:
            self.connector_scheduler.held_blocks.bind(kv_cache_manager)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """The scheduler asks its side once a step, with the step's result."""
        if self.connector_scheduler is not None:
            return self.connector_scheduler.step_stats()
        return super().get_kv_connector_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return BatonConnectorStats(data=data) if data is not None else BatonConnectorStats()
