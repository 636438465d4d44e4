"""What can be measured: a worker that runs prompts of random tokens, alone or as a batch."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.performance_profile import TransferPoint
from deploy.profiling.plan import WorkerLimits

_TOKEN_IDS = (100, 1000)
"""Range of token ids: any vocabulary has them, and few of them are special."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What is worth keeping about the worker beside its limits."""

    model: str
    accelerator: str
    gpus_per_worker: int
    source: str
    startup_s: float | None
    """None: not known."""


class Target(Protocol):
    """One worker; a request that takes too long raises WorkerLost."""

    @property
    def limits(self) -> WorkerLimits: ...

    @property
    def facts(self) -> TargetFacts: ...

    async def prefill(self, prompt: list[int]) -> float:
        """Seconds from the prompt's first scheduling to its first token."""
        ...

    def decode(self, prompt: list[int], max_tokens: int) -> AsyncGenerator[int, None]:
        """Runs a sequence greedily and yields how many tokens each delta brought; closing it aborts."""
        ...

    async def transfer(self, prompt: list[int]) -> TransferPoint | None:
        """Has another worker compute the prompt and pulls its KV; None if nothing can be pulled."""
        ...


class Prompts:
    """Prompts of random tokens. No two are alike, so no prefix cache holds any of them."""

    def __init__(self, seed: int | None = None) -> None:
        # A worker may be measured twice: by default no run repeats the prompts of another.
        self._rng = np.random.default_rng(int.from_bytes(os.urandom(8)) if seed is None else seed)

    def make(self, num_tokens: int) -> list[int]:
        tokens: list[int] = self._rng.integers(*_TOKEN_IDS, num_tokens).tolist()
        return tokens


_ids = itertools.count()
_run = os.urandom(4).hex()


def next_request_id() -> str:
    """Unique over all runs of ``baton profile``."""
    return f"profile-{_run}-{next(_ids)}"


def greedy_params() -> bytes:
    """Encoded sampling parameters: always the likeliest token, and no end before ``max_tokens``."""
    from vllm import SamplingParams

    from engine.vllm_codec import encode_sampling_params

    return encode_sampling_params(SamplingParams(temperature=0.0, ignore_eos=True))
