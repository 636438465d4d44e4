"""Measures what a plan says, within a time budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.performance_profile import DecodePoint, PrefillPoint, TransferPoint
from deploy.profiling.batch import decode_batch
from deploy.profiling.plan import DecodeTask, MeasurementPlan
from deploy.profiling.target import Prompts, Target

OnProgress = Callable[[float, str], None]
"""Called with the share of the work that is done and with what comes next."""

_NUM_REQUIRED = 4
"""Points of each kind that are measured even if the budget is spent: the corners of what is planned."""
_PREFILL_SHARE, _TRANSFER_SHARE = 0.35, 0.1
_WARM_UP_PROMPT_TOKENS, _WARM_UP_STEPS = 1024, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Points in the order of their measurement."""

    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    transfers: tuple[TransferPoint, ...]
    num_skipped: int
    """Planned points that were not measured for want of time, or because a batch did not last."""


class Measuring:
    """One run over a plan.

    Args:
        budget_s: time to spend; each kind of point gets its required ones in any case.
    """

    def __init__(
        self,
        target: Target,
        plan: MeasurementPlan,
        *,
        budget_s: float,
        on_progress: OnProgress,
        prompts: Prompts,
    ) -> None:
        self._target = target
        self._plan = plan
        self._budget_s = budget_s
        self._on_progress = on_progress
        self._prompts = prompts
        self._started_s = time.monotonic()
        self._num_done = 0
        self._num_planned = (
            len(plan.prompt_tokens) + len(plan.transfer_tokens) + plan.num_repeats * len(plan.decodes)
        )
        self._num_skipped = 0
        self._prefill_s_per_token = 0.0
        self._itl_s = 0.0

    async def run(self) -> Measurements:
        """
        Raises:
            core.errors.WorkerLost: the worker died or did not answer in time.
        """
        await self._warm_up()
        prefill = await self._measure_prefills(_PREFILL_SHARE * self._budget_s)
        transfers = await self._measure_transfers((_PREFILL_SHARE + _TRANSFER_SHARE) * self._budget_s)
        decode = await self._measure_decodes(self._budget_s)
        self._on_progress(1.0, "done")
        return Measurements(
            prefill=tuple(prefill),
            decode=tuple(decode),
            transfers=tuple(transfers),
            num_skipped=self._num_skipped,
        )

    def _begin(self, what: str) -> None:
        self._on_progress(self._num_done / self._num_planned, what)
        self._num_done += 1

    def _has_time(self, cost_s: float, until_s: float, num_measured: int) -> bool:
        spent_s = time.monotonic() - self._started_s
        return num_measured < _NUM_REQUIRED or spent_s + cost_s <= until_s

    async def _warm_up(self) -> None:
        self._on_progress(0.0, "warm-up")
        longest = max(self._plan.prompt_tokens)
        await self._target.prefill(self._prompts.make(min(_WARM_UP_PROMPT_TOKENS, longest)))
        task = min(self._plan.decodes, key=lambda task: (task.num_decoding, task.prompt_tokens))
        prompts = [self._prompts.make(task.prompt_tokens)]
        await decode_batch(self._target, prompts, max_tokens=2 * _WARM_UP_STEPS, num_steps=_WARM_UP_STEPS)

    async def _measure_prefills(self, until_s: float) -> list[PrefillPoint]:
        points: list[PrefillPoint] = []
        for num_tokens in self._plan.prompt_tokens:
            self._begin(f"prefill of {num_tokens} tokens")
            samples_s: list[float] = []
            for _ in range(self._plan.num_repeats):
                if samples_s and not self._has_time(samples_s[-1], until_s, len(points)):
                    break
                if not self._has_time(num_tokens * self._prefill_s_per_token, until_s, len(points)):
                    break
                samples_s.append(await self._target.prefill(self._prompts.make(num_tokens)))
            if samples_s:
                points.append(PrefillPoint(prompt_tokens=num_tokens, seconds=statistics.median(samples_s)))
                # Long prompts tell the cost of a token; short ones are mostly constant.
                self._prefill_s_per_token = max(
                    point.seconds / point.prompt_tokens
                    for point in points
                    if 2 * point.prompt_tokens >= max(point.prompt_tokens for point in points)
                )
            self._num_skipped += not samples_s
        return points

    async def _measure_transfers(self, until_s: float) -> list[TransferPoint]:
        points: list[TransferPoint] = []
        for num_tokens in self._plan.transfer_tokens:
            self._begin(f"KV transfer of {num_tokens} tokens")
            if not self._has_time(num_tokens * self._prefill_s_per_token, until_s, len(points)):
                self._num_skipped += 1
                continue
            for _ in range(self._plan.num_repeats):
                point = await self._target.transfer(self._prompts.make(num_tokens))
                if point is None:
                    return _medians(points)
                points.append(point)
        return _medians(points)

    async def _measure_decodes(self, until_s: float) -> list[DecodePoint]:
        """Round after round, so that a disturbance does not meet all the samples of one point."""
        samples: dict[DecodeTask, list[DecodePoint]] = {task: [] for task in self._plan.decodes}
        num_runs = 0
        for _ in range(self._plan.num_repeats):
            for task in self._plan.decodes:
                if not self._has_time(self._cost_s(task), until_s, num_runs):
                    self._num_done += 1
                    continue
                self._begin(f"decode, batch {task.num_decoding}, prompts of {task.prompt_tokens} tokens")
                prompts = [self._prompts.make(task.prompt_tokens) for _ in range(task.num_decoding)]
                point = await decode_batch(
                    self._target, prompts, max_tokens=task.max_tokens, num_steps=task.num_steps
                )
                num_runs += 1
                if point is not None:
                    samples[task].append(point)
                    self._itl_s = max(self._itl_s, point.seconds)
        measured = [points for points in samples.values() if points]
        self._num_skipped += len(samples) - len(measured)
        return [_median_point(points) for points in measured]

    def _cost_s(self, task: DecodeTask) -> float:
        prefill_s = task.num_decoding * task.prompt_tokens * self._prefill_s_per_token
        return prefill_s + self._itl_s * (task.num_steps + task.num_decoding / 4)


def _median_point(points: Sequence[DecodePoint]) -> DecodePoint:
    return sorted(points, key=lambda point: point.seconds)[(len(points) - 1) // 2]


def _medians(points: Sequence[TransferPoint]) -> list[TransferPoint]:
    """One point for each number of bytes."""
    return [
        TransferPoint(
            num_bytes=num_bytes,
            seconds=statistics.median(point.seconds for point in points if point.num_bytes == num_bytes),
        )
        for num_bytes in sorted({point.num_bytes for point in points})
    ]
