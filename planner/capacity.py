"""What one worker can do for a demand within the targets: prompts a second, and answers at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.performance_model import StepTime
from core.step_times import prefill_s, queued_prefill_s
from planner.demand import Demand

Floats = npt.NDArray[np.float64]

TPOT_MARGIN = 1.0
"""Share of the TPOT target up to which decode workers get filled."""
LINK_BYTES_PER_S = 40e9
HANDOFF_S = 0.01
"""What a handoff takes besides the bytes; it falls between the first token and the second."""
_LEAST_S = 1e-6
"""What a prompt adds at least, be it a token long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerKind:
    """What capacity depends on, of one shape."""

    prefill_step_time: StepTime
    decode_step_time: StepTime
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_capacity_tokens: int
    kv_bytes_per_token: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCapacity:
    """Of one prefill worker; arrays have one entry a kind of prompt."""

    alone_s: Floats
    """Seconds a prompt takes with nothing else to do."""
    mean_s: float
    """Seconds a prompt adds to a queue, on average."""
    variation: float
    """Squared coefficient of variation of that."""
    mean_added_s: float
    """Seconds a prompt adds to a step that decodes, on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCapacity:
    """Of one decode worker that spends a share of its time on prompts of its own."""

    num_slots: float
    """Answers at a time within the TPOT target; 0 if not even one."""
    answer_s: float
    """Seconds an answer takes in a batch of that many."""


def prefill_capacity(kind: WorkerKind, demand: Demand) -> PrefillCapacity:
    """What ``demand``'s prompts take."""
    alone_s, queued_s = [], []
    for prompt in demand.prompts:
        num_cached = round(prompt.cached_tokens)
        num_tokens = num_cached + max(1, round(prompt.new_tokens))
        alone_s.append(prefill_s(kind.prefill_step_time, num_tokens, num_cached))
        queued_s.append(
            queued_prefill_s(kind.prefill_step_time, num_tokens, num_cached, kind.max_num_batched_tokens)
        )
    shares = np.array([prompt.share for prompt in demand.prompts])
    seconds, alone = np.array(queued_s), np.array(alone_s)
    mean_s = max(float(shares @ seconds), _LEAST_S)
    return PrefillCapacity(
        alone_s=alone,
        mean_s=mean_s,
        variation=max(0.0, float(shares @ seconds**2) / mean_s**2 - 1.0),
        mean_added_s=max(float(shares @ alone) - _empty_step_s(kind), _LEAST_S),
    )


def _empty_step_s(kind: WorkerKind) -> float:
    """What any step takes: a prompt and a batch in one step pay it once."""
    return kind.decode_step_time.step_s((), 1, 1)


def decode_capacities(
    kind: WorkerKind, demand: Demand, tpot_slo_s: float, prompt_time_shares: Sequence[float]
) -> list[DecodeCapacity]:
    """What ``demand``'s answers leave room for, for each share of time spent on prompts, 0 to below 1.

    The batch is the largest whose steps, stretched by the prompts, keep the target and whose KV fits.
    """
    gaps = max(demand.output_tokens - 1.0, 1.0)
    kv_tokens = demand.kv_tokens
    if kv_tokens is None:
        kv_tokens = demand.prompt_tokens + demand.output_tokens / 2
    handoff_s = HANDOFF_S + demand.prompt_tokens * kind.kv_bytes_per_token / LINK_BYTES_PER_S
    limit_s = TPOT_MARGIN * tpot_slo_s - handoff_s / gaps
    most = max(1, min(kind.max_num_seqs, int(kind.kv_capacity_tokens / max(kv_tokens, 1.0))))

    def step_s(num: int) -> float:
        return kind.decode_step_time.step_s((), num, int(num * kv_tokens))

    capacities = []
    for share in prompt_time_shares:
        num = _largest(most, step_s, limit_s * (1.0 - share))
        answer_s = gaps * step_s(max(num, 1)) / (1.0 - share)
        capacities.append(DecodeCapacity(num_slots=float(num), answer_s=answer_s))
    return capacities


def _largest(most: int, step_s: Callable[[int], float], limit_s: float) -> int:
    """The largest batch of at most ``most`` whose step takes no longer than ``limit_s``; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if step_s(middle) <= limit_s:
            low = middle
        else:
            high = middle - 1
    return low
