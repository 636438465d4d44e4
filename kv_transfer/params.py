"""vLLM's kv_transfer_params: the one place that knows their keys.

Source: vllm/distributed/kv_transfer/kv_connector/v1/nixl (0.32), plus the keys our connector adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import msgspec

REPORT_KEY = "baton_transfer"
"""Ours: in a pulled request's last output, what became of the pull."""
EXPIRES_KEY = "baton_expires_at_s"
"""Ours: in a prefilled request's output, end of its lease on this node's monotonic clock."""
DEADLINE_KEY = "remote_blocks_expiry_time"
"""vLLM's: reaches the connector's worker side with each pull; ours to fill in pull mode."""
NUM_PINNED_STAT = "baton_num_pinned"
"""Ours: in the connector's stats, how many prefilled prompts wait to be pulled, one entry a rank."""
STEPS_STAT = "baton_steps"
"""Ours: in the connector's stats, what the step meter says of steps that have ended."""
STEP_METER_OPTION = "baton_step_meter"
"""Ours: among the connector's options, the class that measures steps, by its full name."""

_REMOTE_KEYS = (
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "tp_size",
    "dcp_size",
    "pp_size",
    "remote_num_tokens",
    "transfer_mode",
)


_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_BlockId = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


class _ConnectorParams(msgspec.Struct, kw_only=True):
    """What vLLM's scheduler and worker read without a check; a wrong type there ends the engine."""

    remote_block_ids: list[list[_BlockId]]
    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    tp_size: _Count
    dcp_size: _Count = 1
    pp_size: _Count = 1
    remote_num_tokens: _Count
    transfer_mode: str | None = None


class Outcome(StrEnum):
    """What became of a KV handle."""

    PULLED = "pulled"
    CACHED = "cached"
    RECOMPUTED = "recomputed"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """One pull as the connector saw it."""

    outcome: Outcome
    reason: str = ""
    num_bytes: int = 0
    pull_s: float = 0.0

    def as_params(self) -> dict[str, Any]:
        return {
            REPORT_KEY: {
                "outcome": self.outcome.value,
                "reason": self.reason,
                "num_bytes": self.num_bytes,
                "pull_s": self.pull_s,
            }
        }

    @staticmethod
    def from_params(params: Mapping[str, Any] | None) -> TransferReport | None:
        """The report in a request's last output, if the connector left one."""
        report = (params or {}).get(REPORT_KEY)
        if report is None:
            return None
        return TransferReport(
            outcome=Outcome(report["outcome"]),
            reason=report["reason"],
            num_bytes=report["num_bytes"],
            pull_s=report["pull_s"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedKv:
    """What a finished prefill left pinned."""

    engine_request_id: str
    num_tokens: int
    tp_size: int
    expires_at_s: float
    connector_params: dict[str, Any]


def check_connector_params(params: Mapping[str, Any], num_tokens: int) -> None:
    """
    Args:
        params: a handle's connector parameters, from another worker.
        num_tokens: prompt tokens that the handle speaks for.

    Raises:
        ValueError: the connector cannot work with them, or they are about other tokens.
    """
    try:
        checked = msgspec.convert(params, _ConnectorParams)
    except msgspec.ValidationError as error:
        raise ValueError(f"KV connector parameters: {error}") from error
    if checked.remote_num_tokens != num_tokens:
        raise ValueError(f"KV of {checked.remote_num_tokens} tokens in a handle for {num_tokens}")
    if unknown := params.keys() - set(_REMOTE_KEYS):
        raise ValueError(f"KV connector parameters: unknown {sorted(unknown)}")


def keep_for_pull() -> dict[str, Any]:
    """For a prefill request: pin the KV when done."""
    return {"do_remote_decode": True, "do_remote_prefill": False}


def pinned_kv(params: Mapping[str, Any] | None) -> PinnedKv | None:
    """Reads what the prefill engine returned; None if it pinned nothing."""
    if not params or not params.get("do_remote_prefill") or not params.get("remote_block_ids"):
        return None
    return PinnedKv(
        engine_request_id=params["remote_request_id"],
        num_tokens=params["remote_num_tokens"],
        tp_size=params["tp_size"],
        expires_at_s=params[EXPIRES_KEY],
        connector_params={key: params[key] for key in _REMOTE_KEYS if key in params},
    )


def pull(connector_params: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
    """For a decode request: pull these blocks, trusting them until ``deadline_s`` on this clock."""
    return {
        **connector_params,
        "do_remote_prefill": True,
        "do_remote_decode": False,
        DEADLINE_KEY: deadline_s,
    }
