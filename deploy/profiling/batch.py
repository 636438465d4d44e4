"""The step time of a batch of sequences, from when their tokens arrive."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Sequence

from core.performance_profile import DecodePoint
from deploy.profiling.target import Target

_SETTLE_TOKENS = 2
"""The last sequence to join counts from this token on."""
_MIN_TOKENS = 4


async def decode_batch(
    target: Target, prompts: Sequence[list[int]], *, max_tokens: int, num_steps: int
) -> DecodePoint | None:
    """Decodes a batch until ``num_steps`` steps with all of it have been seen, and aborts the rest.

    Returns:
        The step time, with the KV tokens held in the middle of what was seen; None if the whole batch
        never ran long enough at once.
    """
    batch = _Batch(len(prompts), num_steps)

    async def run(index: int) -> None:
        async with contextlib.aclosing(target.decode(prompts[index], max_tokens)) as deltas:
            async for num_tokens in deltas:
                batch.on_delta(index, num_tokens)
        batch.on_end()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(index)) for index in range(len(prompts))]
            group.create_task(_cancel_when(batch.done, tasks))
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return batch.point(sum(len(prompt) for prompt in prompts))


async def _cancel_when(done: asyncio.Event, tasks: Sequence[asyncio.Task[None]]) -> None:
    """The only way to stop early: a task that stops by itself could be cancelled while it aborts."""
    await done.wait()
    for task in tasks:
        task.cancel()


class _Batch:
    """When tokens came while all sequences of a batch decode, seen on the last one to join."""

    def __init__(self, num_sequences: int, num_steps: int) -> None:
        self.done = asyncio.Event()
        self._num_steps = num_steps
        self._num_tokens = [0] * num_sequences
        self._num_missing = num_sequences
        self._watched = -1
        self._tokens_at_join = 0
        self._arrivals: list[tuple[float, int]] = []
        """Time, and tokens of the watched sequence until then."""

    @property
    def full(self) -> bool:
        return self.done.is_set()

    def on_delta(self, index: int, num_tokens: int) -> None:
        if not num_tokens:
            return
        now_s = time.monotonic()
        if not self._num_tokens[index]:
            self._num_missing -= 1
            if not self._num_missing:
                self._watched = index
        self._num_tokens[index] += num_tokens
        if self._watched != index or self.full:
            return
        if not self._arrivals:
            self._tokens_at_join = sum(self._num_tokens)
        self._arrivals.append((now_s, self._num_tokens[index]))
        if self._num_tokens[index] >= self._num_steps + _SETTLE_TOKENS:
            self.done.set()

    def on_end(self) -> None:
        """A sequence ended by itself: what comes now is not the whole batch any more."""
        self.done.set()

    def point(self, prompt_tokens: int) -> DecodePoint | None:
        arrivals = [arrival for arrival in self._arrivals if arrival[1] >= _SETTLE_TOKENS]
        if len(arrivals) < 2 or arrivals[-1][1] - arrivals[0][1] < _MIN_TOKENS:
            return None
        num_sequences = len(self._num_tokens)
        # Tokens of the watched sequence before the middle step; the token sampled last has no KV yet.
        before = (arrivals[0][1] + arrivals[-1][1] - 1) / 2
        joined_with = self._arrivals[0][1]
        kv_tokens = prompt_tokens + self._tokens_at_join + num_sequences * (before - joined_with - 1)
        return DecodePoint(
            num_decoding=num_sequences, kv_tokens=round(kv_tokens), seconds=step_seconds(arrivals)
        )


def step_seconds(arrivals: Sequence[tuple[float, int]]) -> float:
    """The slope of time over tokens: the median over all pairs of arrivals (Theil and Sen).

    Neither a hiccup nor tokens that arrive in bursts change it much.

    Args:
        arrivals: time in seconds, and tokens until then; at least two.
    """
    return statistics.median(
        (end_s - start_s) / (end_tokens - start_tokens)
        for (start_s, start_tokens), (end_s, end_tokens) in itertools.combinations(arrivals, 2)
    )
