"""What to measure on a worker, from its limits alone. Pure.

Every list is coarse first: its ends, then the middle, then the quarters. Whoever runs out of time may
stop anywhere and still has points over the whole range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import ConfigError

MIN_PROMPT_TOKENS = 16
_SPARE_TOKENS = 4
"""Left free below ``max_model_len``."""
_SPARE_KV = 0.95
"""Share of the KV memory that measured batches may fill: no sequence may be preempted."""
_RAMP_SLACK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """The limits of the worker to measure."""

    max_model_len: int
    num_kv_blocks: int
    block_size_tokens: int
    kv_bytes_per_token: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def kv_capacity_tokens(self) -> int:
        return self.num_kv_blocks * self.block_size_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSize:
    """How many points there are at most, and how well each is measured."""

    num_prompts: int = 10
    num_repeats: int = 3
    num_batches: int = 7
    num_contexts: int = 5
    num_steps: int = 32
    """Decode steps measured for one point."""
    num_transfers: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTask:
    """A batch to decode."""

    num_decoding: int
    prompt_tokens: int
    """Of each sequence."""
    num_steps: int
    max_tokens: int
    """Tokens each sequence may emit: the measured ones, and those while later prompts are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementPlan:
    """What to measure, coarse first."""

    prompt_tokens: tuple[int, ...]
    num_repeats: int
    decodes: tuple[DecodeTask, ...]
    transfer_tokens: tuple[int, ...]
    """Prompt lengths whose KV is to be handed over, if there is a second worker."""


def measurement_plan(limits: WorkerLimits, grid: GridSize) -> MeasurementPlan:
    """Prompt lengths, and batches over batch size and context, that the worker's limits allow.

    Raises:
        ConfigError: the worker is too small to be measured.
    """
    longest = min(
        limits.max_model_len - _SPARE_TOKENS,
        limits.kv_capacity_tokens - limits.block_size_tokens,
    )
    shortest = min(MIN_PROMPT_TOKENS, longest)
    if longest < 1 or _longest_prompt(limits, 1, grid.num_steps) < 1:
        raise ConfigError(
            f"a worker of max_model_len {limits.max_model_len} and {limits.kv_capacity_tokens} KV tokens "
            f"is too small to be measured: {grid.num_steps} decode steps do not fit; raise one of them"
        )
    return MeasurementPlan(
        prompt_tokens=coarse_first(log_spaced(shortest, longest, grid.num_prompts)),
        num_repeats=grid.num_repeats,
        decodes=_decode_tasks(limits, grid, shortest, longest),
        transfer_tokens=coarse_first(
            log_spaced(min(limits.block_size_tokens, longest), longest, grid.num_transfers)
        ),
    )


def _decode_tasks(
    limits: WorkerLimits, grid: GridSize, shortest: int, longest: int
) -> tuple[DecodeTask, ...]:
    batches = coarse_first(log_spaced(1, limits.max_num_seqs, grid.num_batches))
    contexts = coarse_first(log_spaced(shortest, longest, grid.num_contexts))
    ranked: dict[tuple[int, int], int] = {}
    for batch_rank, num_decoding in enumerate(batches):
        most = _longest_prompt(limits, num_decoding, grid.num_steps)
        for context_rank, context in enumerate(contexts):
            prompt_tokens = min(context, most)
            if prompt_tokens >= 1:
                ranked.setdefault((num_decoding, prompt_tokens), max(batch_rank, context_rank))
    return tuple(
        DecodeTask(
            num_decoding=num_decoding,
            prompt_tokens=prompt_tokens,
            num_steps=grid.num_steps,
            max_tokens=_ramp_steps(limits, num_decoding, prompt_tokens) + grid.num_steps,
        )
        for num_decoding, prompt_tokens in sorted(ranked, key=lambda pair: ranked[pair])
    )


def _ramp_steps(limits: WorkerLimits, num_decoding: int, prompt_tokens: int) -> int:
    """Steps until the last of a batch's prompts is computed, at most; prompts may share steps."""
    room = max(1, limits.max_num_batched_tokens - num_decoding)
    return num_decoding + -(-num_decoding * prompt_tokens // room) + _RAMP_SLACK


def _longest_prompt(limits: WorkerLimits, num_decoding: int, num_steps: int) -> int:
    """Longest prompt with which the whole batch stays in KV memory until it is measured; below 1: none."""
    blocks_each = int(_SPARE_KV * limits.num_kv_blocks) // num_decoding
    room = min(blocks_each * limits.block_size_tokens, limits.max_model_len - _SPARE_TOKENS)
    low, high = 0, room
    while low < high:
        middle = (low + high + 1) // 2
        if middle + _ramp_steps(limits, num_decoding, middle) + num_steps <= room:
            low = middle
        else:
            high = middle - 1
    return low


def log_spaced(low: int, high: int, num: int) -> list[int]:
    """At most ``num`` different whole numbers from ``low`` to ``high``, in even ratios."""
    if low >= high or num < 2:
        return [high]
    ratio = high / low
    return sorted({round(low * ratio ** (index / (num - 1))) for index in range(num)})


def coarse_first(values: Sequence[int]) -> tuple[int, ...]:
    """The same numbers: the ends first, then those that halve what lies between the ones before."""
    if len(values) <= 2:
        return tuple(values)
    order = [0, len(values) - 1]
    spans = [(0, len(values) - 1)]
    while spans:
        halves = []
        for left, right in spans:
            if right - left > 1:
                middle = (left + right) // 2
                order.append(middle)
                halves += [(left, middle), (middle, right)]
        spans = halves
    return tuple(values[index] for index in order)
