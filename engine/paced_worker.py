"""A vLLM CPU worker whose steps last longer than they have to: a slow machine of one's own in miniature.

Chosen by engine arguments alone::

    worker_cls: engine.paced_worker.PacedCPUWorker
    additional_config:
      baton_pace_factor: 4.0
      baton_pace_min_step_ms: 5.0

``engine.pacing`` says which further keys there are and how the pace is kept. Warm-up, dummy runs and
steps without tokens (polling for KV transfers) are not padded. Padding is a sleep at the end of the
step, so other threads of the process, such as the one that answers KV pulls, run on.

Source of the hooks: vllm/v1/worker/gpu_worker.py and vllm/v1/engine/core.py (0.32). The engine calls
``execute_model`` and, where that returns None, ``sample_tokens`` on the same thread.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from engine.pacing import PaceConfig, Pacer, StepWork
from engine.step_reader import StepReader

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = init_logger(__name__)

_STEPS_A_REPORT = 2000
_WORRYING_LATE_SHARE = 0.02


class PacedCPUWorker(CPUWorker):
    """Pads each real step of a CPU engine as its ``additional_config`` says."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._pacer = Pacer(PaceConfig.from_options(vllm_config.additional_config))
        self._pace_work = StepReader()
        self._pace_step: tuple[StepWork, float] | None = None

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        work = self._pace_work.read(scheduler_output)
        if work is None:
            return super().execute_model(scheduler_output)
        self._pacer.begin(time.monotonic(), goes_on=bool(scheduler_output.scheduled_cached_reqs.req_ids))
        self._pace_step = work, time.thread_time()
        output = super().execute_model(scheduler_output)
        if output is not None:
            self._end_paced_step()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        self._end_paced_step()
        return output

    def _end_paced_step(self) -> None:
        if self._pace_step is None:
            return
        work, begin_cpu_s = self._pace_step
        self._pace_step = None
        pacer = self._pacer
        time.sleep(pacer.end(time.monotonic(), work, time.thread_time() - begin_cpu_s))
        if pacer.num_steps == _STEPS_A_REPORT:
            if pacer.num_late > _WORRYING_LATE_SHARE * pacer.num_steps:
                logger.warning(
                    "the pace is not kept: %d of %d steps took longer than padding would have made them; "
                    "slow the pace down or run fewer engines",
                    pacer.num_late,
                    pacer.num_steps,
                )
            pacer.num_steps = pacer.num_late = 0
