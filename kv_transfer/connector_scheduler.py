"""Scheduler side of Baton's KV connector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.utils.import_utils import resolve_obj_by_qualname

from kv_transfer.connector_stats import (
    ENDED_READS_STAT,
    PULLS_STAT,
    STALLED_READS_STAT,
    BatonConnectorStats,
)
from kv_transfer.params import EXPIRES_KEY, STEP_METER_OPTION, STEPS_STAT, Outcome, TransferReport
from kv_transfer.stalled_reads import HeldBlocks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_MAX_REPORTS = 4096


class StepMeter(Protocol):
    """Shown all steps of one engine, in order."""

    def scheduled(self, scheduler_output: SchedulerOutput) -> None:
        """A step is about to be sent to the workers."""

    def done(self) -> Any | None:
        """The first of the steps sent has ended: what to tell of it, as msgpack can carry it."""


class BatonConnectorScheduler(NixlPullConnectorScheduler):
    """Scheduler side: how many tokens a pull covers, and what became of it."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._reports: dict[str, TransferReport] = {}
        meter = vllm_config.kv_transfer_config.get_from_extra_config(STEP_METER_OPTION, "")
        self._step_meter: StepMeter | None = resolve_obj_by_qualname(meter)() if meter else None
        self.held_blocks = HeldBlocks()

    def has_pending_push_work(self) -> bool:
        """Whether steps are needed though no request is there: they look after the reads that go on."""
        return bool(self.held_blocks) or super().has_pending_push_work()

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if self._step_meter is not None:
            self._step_meter.scheduled(scheduler_output)
        return super().build_connector_meta(scheduler_output)

    def step_stats(self) -> KVConnectorStats | None:
        """Once a step, when its result has been taken in."""
        step = None if self._step_meter is None else self._step_meter.done()
        if step is None:
            return None
        stats = BatonConnectorStats()
        stats.data[STEPS_STAT] = [step]
        return stats

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        misfit = self._misfit(params)
        if misfit is not None:
            self._reports[request.request_id] = TransferReport(outcome=Outcome.RECOMPUTED, reason=misfit)
            params["do_remote_prefill"] = False
            self._stop_heartbeat(request.request_id)
            return 0, False
        count = min(params["remote_num_tokens"], request.num_prompt_tokens) - num_computed_tokens
        return (count, True) if count > 0 else (0, False)

    def _misfit(self, params: dict[str, Any]) -> str | None:
        """Why these blocks cannot be pulled at all; None if they can."""
        groups = params.get("remote_block_ids") or []
        num_blocks_needed = -(-params["remote_num_tokens"] // self.block_size)
        if len(groups) != len(self.kv_cache_config.transfer_groups):
            return "other_cache_groups"
        if not self._is_hma_required and any(len(group) < num_blocks_needed for group in groups):
            return "too_few_blocks"
        return None

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        params = request.kv_transfer_params or {}
        if params.get("do_remote_prefill") and num_external_tokens == 0:
            self._reports[request.request_id] = TransferReport(outcome=Outcome.CACHED)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        stats = connector_output.kv_connector_stats
        if stats is not None:
            for request_id, outcome, reason, num_bytes, pull_s in stats.data.get(PULLS_STAT, ()):
                self._merge(
                    request_id,
                    TransferReport(
                        outcome=Outcome(outcome), reason=reason, num_bytes=num_bytes, pull_s=pull_s
                    ),
                )
            for request_id in stats.data.get(STALLED_READS_STAT, ()):
                self.held_blocks.hold(request_id)
            for request_id in stats.data.get(ENDED_READS_STAT, ()):
                self.held_blocks.let_go(request_id)
            for stat in (PULLS_STAT, STALLED_READS_STAT, ENDED_READS_STAT):
                stats.data[stat] = []
        super().update_connector_output(connector_output)

    def _merge(self, request_id: str, report: TransferReport) -> None:
        """Adds one rank's report: bytes add up, the slowest counts, one failure is everybody's."""
        known = self._reports.get(request_id)
        if known is not None:
            failed = known if known.outcome is Outcome.RECOMPUTED else report
            report = TransferReport(
                outcome=failed.outcome,
                reason=failed.reason,
                num_bytes=known.num_bytes + report.num_bytes,
                pull_s=max(known.pull_s, report.pull_s),
            )
        self._reports[request_id] = report
        if len(self._reports) > _MAX_REPORTS:  # of requests that were aborted while they pulled
            del self._reports[next(iter(self._reports))]

    def request_finished(self, request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        delay_free, params = super().request_finished(request, block_ids)
        if params is not None and request.request_id in self._reqs_need_send:
            params[EXPIRES_KEY] = self._reqs_need_send[request.request_id]
        report = self._reports.pop(request.request_id, None)
        if report is not None:
            params = {**(params or {}), **report.as_params()}
        return delay_free, params
