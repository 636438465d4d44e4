"""Worker side of Baton's KV connector: one in each worker process of an engine."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import get_base_request_id
from vllm.logger import init_logger

from kv_transfer.connector_stats import (
    ENDED_READS_STAT,
    PULLS_STAT,
    STALLED_READS_STAT,
    BatonConnectorStats,
)
from kv_transfer.nixl_agent import CountingAgent, make_polled_agent
from kv_transfer.params import NUM_PINNED_STAT, Outcome
from kv_transfer.stalled_reads import StalledReads

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(__name__)

_REMEMBER_RELEASED_S = 30.0


class BatonConnectorWorker(NixlPullConnectorWorker):
    """Worker side: leases enforced by the puller, soft failures, release and renewal."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        affinity = os.sched_getaffinity(0)
        super().__init__(vllm_config, engine_id, kv_cache_config)
        if self.device_type == "cpu":
            os.sched_setaffinity(0, affinity)
            extra = vllm_config.kv_transfer_config.get_from_extra_config
            self.nixl_wrapper: CountingAgent = make_polled_agent(
                base_worker.NixlWrapper,
                base_worker.nixl_agent_config,
                num_threads=extra("num_threads", 4),
                backends=self.nixl_backends,
            )
        else:
            self.nixl_wrapper = CountingAgent(self.nixl_wrapper)
        self.xfer_stats = BatonConnectorStats()
        self._failure_reasons: dict[str, str] = {}
        self._pull_started_s: dict[str, float] = {}
        self._pulled_bytes: dict[str, int] = {}
        self._released: dict[str, float] = {}
        self._extended_deadlines_s: dict[str, float] = {}
        self._last_num_pinned = 0
        self._departed: set[str] = set()
        # Longer than a first lease no pull takes, though it be renewed: renewals are for prompts that wait
        # for room here, and they may travel on other paths than KV does.
        self._max_pull_s = float(
            vllm_config.kv_transfer_config.get_from_extra_config("kv_lease_duration", 30)
        )
        self._stalled = StalledReads(self._has_ended)

    # Pulling.

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        if meta.awaiting_kvs and (reason := self._why_not(req_id, meta)):
            self._fail_pull(req_id, reason)
            return
        self._pull_started_s.setdefault(req_id, time.monotonic())
        try:
            super()._read_blocks_for_req(req_id, meta)
        except Exception:
            logger.exception("KV pull of %s failed; its tokens are recomputed", req_id)
            if meta.awaiting_kvs:
                self._fail_pull(req_id, "pull_error")
        if not meta.awaiting_kvs:
            self._pull_started_s.pop(req_id, None)

    def _fail_pull(self, req_id: str, reason: str) -> None:
        self._failure_reasons[req_id] = reason
        self._handle_failed_transfer(req_id, None, self._recv_failures, record_failed_transfer=False)

    def _why_not(self, req_id: str, meta: ReqMeta) -> str | None:
        """Why a read is not begun; None if it is."""
        assert meta.remote is not None
        if self._is_late(req_id, meta):
            return "lease_over"
        return "peer_stalled" if meta.remote.engine_id in self._stalled.engines else None

    def _is_late(self, req_id: str, meta: ReqMeta) -> bool:
        assert meta.remote is not None
        deadline_s = meta.remote.blocks_expiry_time or 0.0
        extended_s = self._extended_deadlines_s.get(get_base_request_id(req_id), 0.0)
        return time.monotonic() >= max(deadline_s, extended_s)

    def _pop_done_transfers(self, transfers: dict[str, list[Any]]) -> tuple[set[str], set[str]]:
        in_flight = {req_id: list(handles) for req_id, handles in transfers.items()}
        done, failed = super()._pop_done_transfers(transfers)
        for req_id, handles in in_flight.items():
            num_bytes = sum(self.nixl_wrapper.take_bytes(handle) for handle in handles)
            self._pulled_bytes[req_id] = self._pulled_bytes.get(req_id, 0) + num_bytes
        for req_id in done - failed - self._recv_failures:
            meta = self._recving_metadata.get(req_id)
            if meta is not None and self._is_late(req_id, meta):
                failed.add(req_id)
                self._failure_reasons[req_id] = "lease_over"
        self._give_up_late_transfers(transfers, done, failed)
        return done, failed

    def _give_up_late_transfers(
        self, transfers: dict[str, list[Any]], done: set[str], failed: set[str]
    ) -> None:
        """Lets requests go on without a read that has outlived its lease or takes too long."""
        now_s = time.monotonic()
        for req_id in list(transfers):
            meta = self._recving_metadata.get(req_id)
            if meta is None:
                continue
            if self._is_late(req_id, meta):
                self._failure_reasons[req_id] = "lease_over"
            elif now_s - self._pull_started_s.get(req_id, now_s) > self._max_pull_s:
                self._failure_reasons[req_id] = "pull_timeout"
            else:
                continue
            assert meta.remote is not None
            self._stalled.add(req_id, meta.remote.engine_id, transfers.pop(req_id))
            self._recving_metadata[_stalled_key(req_id)] = meta  # vLLM keeps what is known of this peer
            self.xfer_stats.data[STALLED_READS_STAT].append(req_id)
            failed.add(req_id)
            done.add(req_id)

    def _has_ended(self, req_id: str, handle: Any) -> bool:
        try:
            if self.nixl_wrapper.check_xfer_state(handle) == "PROC":
                return False
        except Exception as error:
            logger.info("the read of %s ended with %r", req_id, error)
        return self._try_release_xfer_handle(req_id, handle)

    def _engines_with_inflight_transfers(self) -> set[str]:
        return super()._engines_with_inflight_transfers() | self._stalled.engines

    def extend_deadline(self, request_id: str, deadline_s: float) -> None:
        """A renewed lease: trust these blocks until then, on this node's monotonic clock."""
        now_s = time.monotonic()
        for known_id in [key for key, end_s in self._extended_deadlines_s.items() if end_s < now_s]:
            del self._extended_deadlines_s[known_id]
        self._extended_deadlines_s[request_id] = deadline_s

    def get_transfer_results(self) -> Any:
        for req_id in self._stalled.take_ended():
            del self._recving_metadata[_stalled_key(req_id)]
            self.xfer_stats.data[ENDED_READS_STAT].append(req_id)
        results = super().get_transfer_results()
        now_s = time.monotonic()
        for req_id in results.finished_recving:
            failed = req_id in results.failed_recving
            self.xfer_stats.data[PULLS_STAT].append(
                [
                    req_id,
                    (Outcome.RECOMPUTED if failed else Outcome.PULLED).value,
                    self._failure_reasons.pop(req_id, "pull_failed") if failed else "",
                    self._pulled_bytes.pop(req_id, 0),
                    now_s - self._pull_started_s.pop(req_id, now_s),
                ]
            )
        return results

    # Being pulled from.

    def release(self, request_ids: list[str]) -> None:
        """Gives up pinned KV, named by the ids the requests were submitted with.

        It is freed by the next step. An id may come before the step that pins its KV has told this
        side, so ids are remembered for a while.
        """
        forget_at_s = time.monotonic() + _REMEMBER_RELEASED_S
        self._released.update(dict.fromkeys(request_ids, forget_at_s))

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        if self._released:
            self._free_released(done_sending)
        super()._reap_expired_send_leases(done_sending)

    def _free_released(self, done_sending: set[str]) -> None:
        for req_id in list(self._reqs_to_send):
            if self._released.pop(get_base_request_id(req_id), None) is None:
                continue
            del self._reqs_to_send[req_id]
            self._reqs_to_process.discard(req_id)
            self.consumer_notification_counts_by_req.pop(req_id, None)
            self.expected_consumer_notifications_by_req.pop(req_id, None)
            done_sending.add(req_id)
        now_s = time.monotonic()
        for request_id in [key for key, forget_at_s in self._released.items() if forget_at_s < now_s]:
            del self._released[request_id]

    def renew(self, req_ids: list[str], lease_s: float) -> dict[str, float]:
        """Extends leases; returns when each now ends on this node's monotonic clock.

        What was already pulled, released or freed is missing from the answer.
        """
        end_s = time.monotonic() + lease_s
        pinned = [req_id for req_id in req_ids if req_id in self._reqs_to_send]
        for req_id in pinned:
            self._reqs_to_send[req_id] = max(self._reqs_to_send[req_id], end_s)
        return {req_id: self._reqs_to_send[req_id] for req_id in pinned}

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        num_pinned = len(self._reqs_to_send)
        if num_pinned != self._last_num_pinned:
            self._last_num_pinned = num_pinned
            self.xfer_stats.data[NUM_PINNED_STAT] = [num_pinned]
        return super().get_kv_connector_stats()

    def connect(self, engine_id: str, host: str, port: int, tp_size: int) -> None:
        """Starts the handshake with a peer unless it is done or under way."""
        if engine_id != self.engine_id:
            self._ensure_handshake(engine_id, host, port, tp_size)

    def disconnect(self, engine_ids: list[str]) -> int:
        """Frees what is kept for peers that are gone; returns for how many peers something is kept.

        vLLM itself keeps the descriptors of all their blocks for an hour, unless another engine takes over
        the same address.
        """
        self._departed.update(engine_ids)
        self._cleanup_remote_engines()
        return len(self._remote_agents)

    def _cleanup_remote_engines(self) -> None:
        with self._handshake_lock:
            # An engine without an address counts as replaced; it goes when no pull from it is left.
            for address, engine_id in list(self._engine_by_address.items()):
                if engine_id in self._departed:
                    del self._engine_by_address[address]
            self._departed.intersection_update(self._handshake_futures)
        super()._cleanup_remote_engines()

    def shutdown(self) -> None:
        if hasattr(self, "nixl_wrapper") and hasattr(self.nixl_wrapper, "stop_polling"):
            self.nixl_wrapper.stop_polling()
        super().shutdown()


def _stalled_key(req_id: str) -> str:
    """Among the requests that receive KV; no request is called so."""
    return f"{req_id} stalled"
