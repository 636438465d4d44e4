"""The mock engine's KV transfer parameters: the keys of the real connector, as far as they matter here.

The keys belong to ``kv_transfer/params.py``; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.base import KvParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteKv:
    """KV on another worker, for this one to pull."""

    num_tokens: int
    deadline_s: float
    """On this node's monotonic clock: a pull not complete by then counts as failed."""


def asks_to_keep_kv(params: KvParams | None) -> bool:
    """Whether the prompt's KV is to stay pinned for a pull."""
    return bool(params and params.get("do_remote_decode"))


def remote_kv(params: KvParams | None) -> RemoteKv | None:
    """What the request says can be pulled; nothing of a real engine's KV can."""
    if not params or not params.get("do_remote_prefill"):
        return None
    return RemoteKv(
        num_tokens=params["remote_num_tokens"] if params.get("remote_host") == "mock" else 0,
        deadline_s=params.get("remote_blocks_expiry_time", float("inf")),
    )


def pinned_params(
    *, incarnation: str, request_id: str, num_tokens: int, tp_size: int, lease_end_s: float
) -> KvParams:
    """For the last delta of a request whose KV stays pinned.

    ``lease_end_s`` is on this node's monotonic clock. Mock blocks have no identity: the block ids only
    say that there are some.
    """
    return {
        "mock": True,
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": incarnation,
        "remote_request_id": request_id,
        "remote_host": "mock",
        "remote_port": 0,
        "remote_block_ids": [[0]],
        "remote_num_tokens": num_tokens,
        "tp_size": tp_size,
        "baton_expires_at_s": lease_end_s,
    }


def pull_report(outcome: str, *, reason: str = "", num_bytes: int = 0, pull_s: float = 0.0) -> KvParams:
    """For the last delta of a request that came with remote KV.

    ``outcome`` is ``pulled``, ``cached`` or ``recomputed``.
    """
    return {
        "mock": True,
        "baton_transfer": {
            "outcome": outcome,
            "reason": reason,
            "num_bytes": num_bytes,
            "pull_s": pull_s,
        },
    }
