"""One worker's load as one router knows it: the last word of it, plus what was sent since."""

from __future__ import annotations

import math

from core.clock import Clock
from core.types import WorkerLoad, WorkerReport
from router.routing import Candidate
from router.step_times import StepTimes, prefill_s

LOCAL_PREFILL_WINDOW_S = 10.0
"""Time constant of what a decode worker's own prefills count for."""
_TYPICAL_PROMPT_TOKENS = 2048


class WorkerView:
    """Turns reports, piggybacked loads and the router's own requests into what the policy chooses from.

    Prompts are counted in seconds: those this router has sent and not heard back of by what was
    predicted for them, those of other routers by their tokens in the worker's last load.

    Args:
        report: the worker's first report.
        clock: the router's.
        step_times: how long steps take, by shape and role.
    """

    __slots__ = (
        "_candidate",
        "_clock",
        "_foreign_free_at_s",
        "_heard",
        "_load",
        "_local_prefill_at_s",
        "_local_prefill_s",
        "_own_prefill_s",
        "_own_prefill_tokens",
        "_prefill_free_at_s",
        "_prefills",
        "_sent_kv_tokens",
        "_sent_requests",
        "report",
        "step_times",
    )

    def __init__(self, report: WorkerReport, clock: Clock, step_times: StepTimes) -> None:
        self.report = report
        self.step_times = step_times
        self._clock = clock
        self._candidate: Candidate | None = None
        self._heard = False
        self._prefills: dict[str, tuple[int, float]] = {}
        """Prompts sent and not answered yet: tokens, and predicted seconds."""
        self._local_prefill_s = 0.0
        self._local_prefill_at_s = clock.now_s()
        self._own_prefill_tokens = 0
        self._own_prefill_s = 0.0
        self._prefill_free_at_s = 0.0
        """When the prompts this router has sent will have been computed, were there no others."""
        self._foreign_free_at_s = 0.0
        """When those of other routers will have been."""
        self._set_load(report.load)

    @property
    def load(self) -> WorkerLoad:
        """The last load heard of."""
        return self._load

    def on_load(self, load: WorkerLoad) -> None:
        """The worker said its load itself, along with an answer."""
        self._heard = True
        self._set_load(load)

    def on_report(self, report: WorkerReport) -> None:
        """A snapshot's report; its load is older than what the worker has said since the one before."""
        self.report = report
        if not self._heard:
            self._set_load(report.load)
        self._heard = False
        self._candidate = None

    def prefill_sent(self, request_id: str, prompt_tokens: int, predicted_s: float) -> None:
        """A prompt is being sent; ``predicted_s`` is how long the worker will compute it."""
        self._prefills[request_id] = prompt_tokens, predicted_s
        self._own_prefill_tokens += prompt_tokens
        self._own_prefill_s += predicted_s
        self._prefill_free_at_s = max(self._prefill_free_at_s, self._clock.now_s()) + predicted_s
        self._sent_requests += 1
        self._candidate = None

    def prefill_ended(self, request_id: str) -> None:
        """Its answer is here, or none will come; what is still out is computed from now on."""
        if request_id not in self._prefills:
            return  # it was sent to an earlier start of the worker
        prompt_tokens, predicted_s = self._prefills.pop(request_id)
        self._own_prefill_tokens -= prompt_tokens
        self._own_prefill_s = self._own_prefill_s - predicted_s if self._prefills else 0.0
        self._prefill_free_at_s = self._clock.now_s() + self._own_prefill_s
        self._candidate = None

    def decode_sent(self, kv_tokens: int, local_prefill_s: float = 0.0) -> None:
        """A decode leg is being sent; it counts until the worker's next word.

        Args:
            kv_tokens: of the prompt.
            local_prefill_s: how long the worker will compute the prompt itself, as predicted.
        """
        self._sent_requests += 1
        self._sent_kv_tokens += kv_tokens
        self._local_prefill_s = self._recent_local_prefill_s() + local_prefill_s
        self._local_prefill_at_s = self._clock.now_s()
        self._candidate = None

    def _recent_local_prefill_s(self) -> float:
        """Seconds of local prefills, older ones weighing less."""
        age_s = self._clock.now_s() - self._local_prefill_at_s
        return self._local_prefill_s * math.exp(-age_s / LOCAL_PREFILL_WINDOW_S)

    def candidate(self) -> Candidate:
        """The worker as the policy sees it now."""
        if self._candidate is None:
            report, load, now_s = self.report, self._load, self._clock.now_s()
            foreign_s = max(0.0, self._foreign_free_at_s - now_s)
            self._candidate = Candidate(
                worker_id=report.worker_id,
                revision=report.revision,
                role=report.role,
                node_id=report.node_id,
                num_requests=load.num_running + load.num_waiting + self._sent_requests,
                waiting_prefill_tokens=max(load.waiting_prefill_tokens, self._own_prefill_tokens),
                prefill_free_at_s=max(self._prefill_free_at_s, now_s) + foreign_s,
                local_prefill_share=self._recent_local_prefill_s() / LOCAL_PREFILL_WINDOW_S,
                kv_used_tokens=load.kv_used_blocks * report.block_size_tokens + self._sent_kv_tokens,
                kv_capacity_tokens=report.kv_capacity_tokens,
                kv_bytes_per_token=report.bytes_per_block // report.block_size_tokens,
                step_time=self.step_times.of(report.shape, report.role),
            )
        return self._candidate

    def predicted_prefill_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """How long the worker will compute a prompt; 0 where nobody knows."""
        step_time = self.step_times.of(self.report.shape, self.report.role)
        return 0.0 if step_time is None else prefill_s(step_time, prompt_tokens, cached_tokens)

    def _seconds_of(self, prefill_tokens: int) -> float:
        """Of prompts of which only the tokens are known."""
        if not prefill_tokens:
            return 0.0
        return self.predicted_prefill_s(_TYPICAL_PROMPT_TOKENS, 0) * prefill_tokens / _TYPICAL_PROMPT_TOKENS

    def _set_load(self, load: WorkerLoad) -> None:
        self._load = load
        foreign_tokens = max(0, load.waiting_prefill_tokens - self._own_prefill_tokens)
        self._foreign_free_at_s = self._clock.now_s() + self._seconds_of(foreign_tokens)
        self._sent_requests = self._sent_kv_tokens = 0
        self._candidate = None
