"""Methods our connector needs inside vLLM's worker processes, called through collective_rpc."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group


class BatonWorkerExtension:
    """Mixed into vLLM's worker class (``worker_extension_cls``); names are prefixed to stay apart."""

    def baton_settle(self) -> None:
        """Does nothing: its answer says that everything sent before it has been handled."""

    def baton_release_kv(self, request_ids: list[str]) -> None:
        _connector_worker().release(request_ids)

    def baton_renew_kv(self, engine_request_ids: list[str], lease_s: float) -> dict[str, float]:
        return _connector_worker().renew(engine_request_ids, lease_s)

    def baton_extend_kv_deadline(self, request_id: str, deadline_s: float) -> None:
        _connector_worker().extend_deadline(request_id, deadline_s)

    def baton_connect_kv(self, peer: dict[str, Any]) -> None:
        _connector_worker().connect(**peer)

    def baton_disconnect_kv(self, engine_ids: list[str]) -> int:
        return int(_connector_worker().disconnect(engine_ids))


def _connector_worker() -> Any:
    return get_kv_transfer_group().connector_worker
