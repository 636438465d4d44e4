"""What goes into a worker model and what comes out: its settings, sequences, steps and effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.performance_model import PrefillChunk
from core.prefix_cache import BlockHash
from core.record import record


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModelConfig:
    """The limits of one worker; the names are vLLM's where vLLM has one."""

    num_kv_blocks: int
    block_size_tokens: int = 16
    hash_block_tokens: int = 0
    """Tokens under one hash of the prefix cache: a multiple of the block size, 0 for the block size."""
    max_num_seqs: int = 256
    """Most sequences in one step."""
    max_num_batched_tokens: int = 8192
    """Most tokens computed in one step; longer prompts are prefilled in chunks."""
    max_num_waiting: int = 0
    """Sequences queued before more are refused; 0 for no limit."""
    lease_s: float = 30.0
    """How long KV stays pinned for a pull unless the lease is renewed."""

    def __post_init__(self) -> None:
        for name in ("num_kv_blocks", "block_size_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence adds a token a step"
            )
        if self.hash_block_tokens % self.block_size_tokens:
            raise ValueError(
                f"hash_block_tokens ({self.hash_block_tokens}) must be a multiple of block_size_tokens "
                f"({self.block_size_tokens})"
            )

    @property
    def kv_capacity_tokens(self) -> int:
        return self.num_kv_blocks * self.block_size_tokens


@record
class SequenceSpec:
    """One sequence to run."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    """Tokens to emit; the model knows no other end."""
    priority: int = 0
    """Lower runs first; equals run in order of arrival."""
    block_hashes: Sequence[BlockHash] = ()
    """Names of the full pieces (see ``hash_block_tokens``) at the front of prompt and, where known,
    output. Each stands for everything up to its end."""
    remote_tokens: int = 0
    """Leading prompt tokens whose KV another worker holds for this one to pull."""
    keep_kv: bool = False
    """Pin the KV under a lease when the sequence finishes."""

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 1 or self.max_tokens < 1:
            raise ValueError(
                f"num_prompt_tokens ({self.num_prompt_tokens}) and max_tokens ({self.max_tokens}) must be "
                f"at least 1"
            )
        if not 0 <= self.remote_tokens <= self.num_prompt_tokens:
            raise ValueError(
                f"remote_tokens ({self.remote_tokens}) must lie between 0 and num_prompt_tokens "
                f"({self.num_prompt_tokens})"
            )


@record
class Step:
    """What the worker computes next: chunks of prompts and decodes, or several decode steps in a row."""

    start_s: float
    ends_s: Sequence[float]
    """When each step ends; more than one only if all steps are decodes of one batch."""
    prefills: tuple[PrefillChunk, ...]
    num_decoding: int

    @property
    def end_s(self) -> float:
        return self.ends_s[-1]


@record
class KvPull:
    """Blocks are set aside: move the KV, then say ``kv_arrived`` exactly once, aborted or not."""

    request_id: str
    num_tokens: int
    """Remote tokens the worker's own prefix cache does not hold."""


@record
class Plan:
    """What planning a step led to."""

    step: Step | None = None
    """None: nothing to compute until an event or ``next_deadline_s``."""
    pulls: tuple[KvPull, ...] = ()
    unneeded_pulls: tuple[str, ...] = ()
    """Sequences whose remote KV the prefix cache holds already: it may be released there."""
    preempted: tuple[str, ...] = ()
    """Sequences whose KV was dropped for want of blocks; they will recompute it."""


@record
class Prefilled:
    """A sequence computed all its tokens so far and got one more at the step's end."""

    request_id: str
    resumed: bool
    """True after a preemption: earlier tokens were emitted before."""
    num_cached_tokens: int
    """Tokens cached or pulled when it was first scheduled."""
    queue_s: float
    """From arrival to first scheduling, a pull included."""
    prefill_s: float
    """From first scheduling to the end of this step."""


@record
class Finished:
    """A sequence emitted its last token at the step's end."""

    request_id: str
    num_tokens: int
    """Tokens it emitted."""
    num_preemptions: int
    pinned_tokens: int = 0
    """KV tokens pinned for a pull."""
    lease_end_s: float | None = None
    """When the pin ends unless renewed; None: nothing is pinned."""


@record
class StepResult:
    """The tokens of a step: one at its end for each of ``prefilled``, one at each of ``ends_s`` for
    each of ``decoded``."""

    ends_s: Sequence[float]
    decoded: tuple[str, ...]
    prefilled: tuple[Prefilled, ...]
    finished: tuple[Finished, ...]
