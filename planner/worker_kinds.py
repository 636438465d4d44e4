"""What workers of each shape can do, learned from their reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from core.step_times import StepTimes
from core.types import Role, WorkerReport
from planner.capacity import WorkerKind
from planner.plausible import has_plausible_sizes


class WorkerKinds:
    """Sizes and step times by shape.

    Args:
        step_times: learns from the reports.
    """

    def __init__(self, step_times: StepTimes) -> None:
        self._step_times = step_times
        self._sizes: dict[str, WorkerReport] = {}
        self._heartbeats: dict[str, int] = {}
        """The last one of each engine start that was learned from."""

    def observe(self, reports: Iterable[WorkerReport]) -> None:
        """Learns from reports; each counts once."""
        seen = {}
        for report in reports:
            if has_plausible_sizes(report):
                self._sizes[report.shape] = report
            if self._heartbeats.get(report.incarnation) != report.heartbeat:
                self._step_times.observe(report.shape, report.role, report.steps)
            seen[report.incarnation] = report.heartbeat
        self._heartbeats = seen

    def kinds(self, shapes: Iterable[str]) -> Mapping[str, WorkerKind] | None:
        """By shape; None while a shape's step times or sizes are not known."""
        kinds = {}
        for shape in shapes:
            prefill = self._step_times.of(shape, Role.PREFILL)
            decode = self._step_times.of(shape, Role.DECODE)
            size = self._sizes.get(shape)
            if prefill is None or decode is None or size is None:
                return None
            kinds[shape] = WorkerKind(
                prefill_step_time=prefill,
                decode_step_time=decode,
                max_num_seqs=size.max_num_seqs,
                max_num_batched_tokens=size.max_num_batched_tokens,
                kv_capacity_tokens=size.kv_capacity_tokens,
                kv_bytes_per_token=size.bytes_per_block / max(size.block_size_tokens, 1),
            )
        return kinds
