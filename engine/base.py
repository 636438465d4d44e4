"""The engine interface the two legs are written against."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from core.observed_steps import StepObservation
from core.types import WorkerLoad
from engine.cache_log import CacheLog

KvParams = dict[str, Any]
"""KV transfer parameters, opaque to the engine package; kv_transfer makes and reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One sequence to run: a tokenized prompt and how to sample from it."""

    request_id: str
    """Unique over all attempts; minted by the relay, never the client's."""
    prompt_token_ids: list[int]
    max_tokens: int
    sampling_params: bytes = b""
    """msgpack of the engine's sampling parameters (vLLM SamplingParams); n is always 1."""
    options: bytes = b""
    """msgpack of further engine arguments (LoRA, cache salt, reasoning state)."""
    priority: int = 0
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    kv_params: KvParams | None = None
    replay_token_ids: Sequence[int] = ()
    """Tokens the answer begins with, whatever would be sampled; they come out like any others, and leave
    seeds, penalties and grammars as they left them when they were sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRows:
    """Log probabilities of ``rows`` positions with ``width`` candidates each.

    Column 0 is the token that was sampled (or stood in the prompt), the rest are the top candidates
    by rank, as vLLM's LogprobsLists has them.
    """

    token_ids: np.ndarray
    """int32 [rows, width]"""
    logprobs: np.ndarray
    """float32 [rows, width]"""
    ranks: np.ndarray
    """int32 [rows]: rank of column 0"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDelta:
    """What one engine step added to one request."""

    token_ids: Sequence[int] = ()
    logprobs: LogprobRows | None = None
    prompt_logprobs: LogprobRows | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens not computed for this request; given with the first delta only."""
    num_cache_creation_tokens: int | None = None
    """Prompt tokens computed and put into the prefix cache; given with the first delta only."""
    finish_reason: str | None = None
    """``stop``, ``length``, ``abort``, ``error`` or ``repetition`` on the last delta."""
    stop_reason: int | str | None = None
    kv_params: KvParams | None = None
    """On the last delta: what the KV connector says about this request."""
    queue_s: float | None = None
    """Time between arrival and first scheduling; given with the first delta only."""
    prefill_s: float | None = None
    """Time between first scheduling and first token; given with the first delta only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What is fixed for the life of one engine start."""

    incarnation: str
    model: str
    block_size_tokens: int
    num_kv_blocks: int
    bytes_per_block: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tp_size: int
    kv_layout: str
    """Fingerprint of everything that must match for KV to be exchanged: dtype, layout, heads, layers."""
    startup_s: Mapping[str, float] = field(default_factory=dict)
    """Start-up time by phase, in seconds."""


class Engine(Protocol):
    """One engine. Every method is called on the event loop the engine was started on."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def dead(self) -> bool:
        """True once the engine cannot serve any more; it never recovers."""
        ...

    @property
    def cache_log(self) -> CacheLog | None:
        """What the prefix cache holds, as states of ``core.prompt_blocks``; None if it cannot tell."""
        ...

    def load(self) -> WorkerLoad: ...

    def take_steps(self) -> tuple[StepObservation, ...]:
        """A few of the steps since the last call; none that contain waiting."""
        ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        """Runs one request. Closing the iterator aborts it and frees its KV.

        Raises:
            ValueError: the engine does not accept the request.
            core.errors.WorkerLost: the engine died.
        """
        ...

    async def release_kv(self, request_ids: Sequence[str]) -> None:
        """Frees KV pinned for pulls that will not come, named by EngineRequest.request_id."""
        ...

    async def settle(self) -> None:
        """Returns when every abort made so far has reached the engine."""
        ...

    async def renew_kv(self, engine_request_ids: Sequence[str], lease_s: float) -> Mapping[str, float]:
        """Extends leases of pinned KV.

        Returns:
            Monotonic time (this node's clock, seconds) each lease now ends; ids that are not pinned
            any more are missing.
        """
        ...

    async def extend_kv_deadline(self, request_id: str, deadline_s: float) -> None:
        """Trusts the blocks a waiting request is about to pull until ``deadline_s`` (this node's clock)."""
        ...

    async def connect_kv(self, peer: KvParams) -> None:
        """Makes the KV connection to a peer engine before the first pull needs it."""
        ...

    async def disconnect_kv(self, incarnations: Sequence[str]) -> int:
        """Frees what is kept for peer engines that are gone, as soon as nothing is being pulled from them.

        Returns:
            For how many peers something is still kept.
        """
        ...

    async def shutdown(self, timeout_s: float) -> None: ...
