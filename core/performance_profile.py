"""Measured step times of one kind of worker, and what else a simulation needs to know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from core.errors import ConfigError
from core.performance_model import KvLink
from core.worker_events import WorkerModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPoint:
    """One measured prompt, alone on the worker, from its first scheduling to its first token."""

    prompt_tokens: int
    """Tokens of the whole prompt."""
    seconds: float
    context_tokens: int = 0
    """Leading tokens that were cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePoint:
    """One measured pure decode step."""

    num_decoding: int
    """Sequences in the batch."""
    kv_tokens: int
    """KV tokens they hold together."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPoint:
    """One measured KV pull."""

    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PerformanceProfile:
    """One shape of worker, as measured or published.

    Raises:
        core.errors.ConfigError: points are missing, or a figure makes no sense.
    """

    name: str
    source: str
    """Where the figures come from, with their licence."""
    model: str
    accelerator: str
    gpus_per_worker: int
    """TP size; 0 for a CPU worker."""
    kv_capacity_tokens: int
    block_size_tokens: int
    kv_bytes_per_token: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    link: KvLink
    """How KV leaves and enters a worker."""
    startup_s: float = 60.0
    """From the decision to start a worker to its first request."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a performance profile has no name: give it one")
        self._check_figures()
        for prompt in self.prefill:
            if not 0 <= prompt.context_tokens < prompt.prompt_tokens:
                self._refuse(
                    f"context_tokens ({prompt.context_tokens}) must lie between 0 and prompt_tokens "
                    f"({prompt.prompt_tokens}) less 1"
                )
            self._check_seconds(f"prompt of {prompt.prompt_tokens} tokens", prompt.seconds)
        for step in self.decode:
            if step.num_decoding < 1 or step.kv_tokens < 0:
                self._refuse(
                    f"a decode point needs at least 1 sequence and no negative KV, not "
                    f"{step.num_decoding} sequences and {step.kv_tokens} KV tokens"
                )
            self._check_seconds(
                f"decode step of {step.num_decoding} sequences and {step.kv_tokens} KV tokens", step.seconds
            )
        num_lengths = len({prompt.prompt_tokens for prompt in self.prefill if not prompt.context_tokens})
        if num_lengths < 2:
            self._refuse(f"it needs uncached prompts of at least 2 lengths, not {num_lengths}: measure more")
        num_steps = len({(step.num_decoding, step.kv_tokens) for step in self.decode})
        if num_steps < 2:
            self._refuse(
                f"it needs at least 2 decode points of unlike batch or KV, not {num_steps}: measure more"
            )

    def _check_figures(self) -> None:
        for name in ("block_size_tokens", "kv_bytes_per_token", "max_num_seqs"):
            if getattr(self, name) < 1:
                self._refuse(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.gpus_per_worker < 0:
            self._refuse(f"gpus_per_worker must be 0 (CPU) or more, not {self.gpus_per_worker}")
        if self.kv_capacity_tokens < self.block_size_tokens:
            self._refuse(
                f"kv_capacity_tokens ({self.kv_capacity_tokens}) must hold a block of "
                f"{self.block_size_tokens} tokens"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            self._refuse(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence adds a token a step"
            )
        if not (math.isfinite(self.startup_s) and self.startup_s >= 0):
            self._refuse(f"startup_s must be 0 or more, not {self.startup_s}")
        if not (math.isfinite(self.link.latency_s) and self.link.latency_s >= 0 < self.link.bytes_per_s):
            self._refuse(
                f"its link needs a latency of 0 or more and a positive bandwidth, not "
                f"{self.link.latency_s} s and {self.link.bytes_per_s} bytes/s"
            )

    def _check_seconds(self, what: str, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds > 0):
            self._refuse(f"the {what} took {seconds} s: remove the point or measure it again")

    def _refuse(self, message: str) -> NoReturn:
        raise ConfigError(f"performance profile {self.name!r}: {message}")

    def worker_model_config(self) -> WorkerModelConfig:
        """The limits of a worker model that stands for this kind of worker."""
        return WorkerModelConfig(
            num_kv_blocks=self.kv_capacity_tokens // self.block_size_tokens,
            block_size_tokens=self.block_size_tokens,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
        )
