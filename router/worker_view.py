"""One worker's load as one router knows it: the last word of it, plus what was sent since."""

from __future__ import annotations

import math

from core.clock import Clock
from core.step_times import StepTimes, prefill_s, queued_prefill_s
from core.types import WorkerLoad, WorkerReport
from router.cache_fill import CacheFill
from router.prefill_queue import PrefillQueue
from router.routing import Candidate

LOCAL_PREFILL_WINDOW_S = 3.0
"""Time constant of what a decode worker's own prefills count for."""
EXPECTED_WITHIN_S = 1.0
"""How far ahead a decode worker counts on requests that are still being prefilled."""
_TYPICAL_PROMPT_TOKENS = 2048
_SAME_WORD_S = 0.005


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
        "_cache",
        "_candidate",
        "_clock",
        "_expected",
        "_expected_kv_tokens",
        "_heard",
        "_load",
        "_load_at_s",
        "_local_prefill_at_s",
        "_local_prefill_s",
        "_own_prefill_tokens",
        "_prefill_queue",
        "_prefills",
        "_sent_kv_tokens",
        "_sent_requests",
        "_step_time",
        "num_routers",
        "report",
        "step_times",
    )

    def __init__(self, report: WorkerReport, clock: Clock, step_times: StepTimes) -> None:
        self.report = report
        self.step_times = step_times
        self._step_time = step_times.of(report.shape, report.role)
        self._clock = clock
        self._candidate: Candidate | None = None
        self._heard = False
        self._prefills: dict[str, tuple[int, float]] = {}
        """Prompts sent and not answered yet: tokens, and predicted seconds."""
        self.num_routers = 1
        """Who send prompts to it, each about as many as this one."""
        self._local_prefill_s = 0.0
        self._local_prefill_at_s = clock.now_s()
        self._own_prefill_tokens = 0
        self._prefill_queue = PrefillQueue(clock.now_s())
        self._cache = CacheFill(report.kv_capacity_tokens)
        self._expected: dict[str, int] = {}
        """Requests that will decode here once prefilled elsewhere, and their prompt tokens."""
        self._expected_kv_tokens = 0
        self._set_load(report.load)
        step_times.observe(report.shape, report.role, report.steps)

    @property
    def drifts(self) -> bool:
        """Whether :meth:`candidate` changes by the mere passing of time: other routers send here too."""
        return self._prefill_queue.shared

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
        if report.heartbeat > self.report.heartbeat:
            self.step_times.observe(report.shape, report.role, report.steps)
        self.report = report
        self._step_time = self.step_times.of(report.shape, report.role)
        if not self._heard:
            self._set_load(report.load)
        self._heard = False
        self._candidate = None

    def prefill_sent(
        self, request_id: str, prompt_tokens: int, predicted_s: float, *, cached_tokens: int = 0
    ) -> None:
        """A prompt is being sent.

        Args:
            predicted_s: how much longer the worker's queue becomes by it.
            cached_tokens: of it, as far as is known.
        """
        self._cache.filled(self._clock.now_s(), prompt_tokens - cached_tokens)
        self._prefills[request_id] = prompt_tokens, predicted_s
        self._own_prefill_tokens += prompt_tokens
        self._prefill_queue.sent(self._clock.now_s(), predicted_s)
        if self._load.num_decoding:
            self._note_local_prefill(predicted_s)
        self._sent_requests += 1
        self._candidate = None

    def prefill_ended(self, request_id: str) -> None:
        """Its answer is here, or none will come; what is still out is computed from now on."""
        if request_id not in self._prefills:
            return  # it was sent to an earlier start of the worker
        prompt_tokens, predicted_s = self._prefills.pop(request_id)
        self._own_prefill_tokens -= prompt_tokens
        now_s = self._clock.now_s()
        self._prefill_queue.ended(now_s, predicted_s, none_left=not self._prefills)
        if now_s - self._load_at_s <= _SAME_WORD_S:  # the load came with this answer, and counts it no more
            self._set_foreign(self._load)
        self._candidate = None

    def decode_sent(self, kv_tokens: int, local_prefill_s: float = 0.0) -> None:
        """A decode leg is being sent; it counts until the worker's next word.

        Args:
            kv_tokens: of the prompt.
            local_prefill_s: how long the worker will compute the prompt itself, as predicted.
        """
        self._sent_requests += 1
        self._sent_kv_tokens += kv_tokens
        self._note_local_prefill(local_prefill_s)
        self._candidate = None

    def decode_expected(self, request_id: str, kv_tokens: int, in_s: float | None = None) -> None:
        """A prompt that will be decoded here is being computed elsewhere.

        Args:
            in_s: when it is expected, from now; None if nobody knows. One that comes much later is passed
                over: by then the worker has other requests.
        """
        if in_s is not None and in_s > EXPECTED_WITHIN_S:
            return
        self._expected[request_id] = kv_tokens
        self._expected_kv_tokens += kv_tokens
        self._candidate = None

    def decode_expected_no_more(self, request_id: str) -> None:
        """Its decode leg is being sent, or none will come; what is not expected is passed over."""
        if (kv_tokens := self._expected.pop(request_id, None)) is not None:
            self._expected_kv_tokens -= kv_tokens
            self._candidate = None

    def _note_local_prefill(self, seconds: float) -> None:
        """The worker's answers will stand still for so long."""
        self._local_prefill_s = self._recent_local_prefill_s() + seconds
        self._local_prefill_at_s = self._clock.now_s()

    def _recent_local_prefill_s(self) -> float:
        """Seconds of prompts computed between steps of answers, older ones weighing less."""
        if not self._local_prefill_s:
            return 0.0
        age_s = self._clock.now_s() - self._local_prefill_at_s
        return self._local_prefill_s * math.exp(-age_s / LOCAL_PREFILL_WINDOW_S)

    def candidate(self) -> Candidate:
        """The worker as the policy sees it now."""
        if self._candidate is None or self.drifts:
            report, load, now_s = self.report, self._load, self._clock.now_s()
            self._candidate = Candidate(
                worker_id=report.worker_id,
                revision=report.revision,
                role=report.role,
                node_id=report.node_id,
                num_decoding=load.num_decoding,
                num_requests=load.num_running + load.num_waiting + self._sent_requests + len(self._expected),
                waiting_prefill_tokens=max(load.waiting_prefill_tokens, self._own_prefill_tokens),
                prefill_free_at_s=self._prefill_queue.free_at_s(now_s),
                own_prefills=len(self._prefills),
                local_prefill_share=self.num_routers
                * self._recent_local_prefill_s()
                / LOCAL_PREFILL_WINDOW_S,
                kv_used_tokens=load.kv_used_blocks * report.block_size_tokens
                + self._sent_kv_tokens
                + self._expected_kv_tokens,
                kv_capacity_tokens=report.kv_capacity_tokens,
                kv_bytes_per_token=report.bytes_per_block // report.block_size_tokens,
                max_num_seqs=report.max_num_seqs,
                max_num_batched_tokens=report.max_num_batched_tokens,
                cache_free_tokens=self._cache.free_tokens,
                cache_oldest_at_s=self._cache.oldest_at_s(),
                step_time=self._step_time,
            )
        return self._candidate

    def predicted_prefill_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """How long the worker will compute a prompt alone; 0 where nobody knows."""
        return 0.0 if self._step_time is None else prefill_s(self._step_time, prompt_tokens, cached_tokens)

    def queued_prefill_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """How much longer the worker's queue becomes by a prompt; 0 where nobody knows."""
        if self._step_time is None:
            return 0.0
        limit = self.report.max_num_batched_tokens
        return queued_prefill_s(self._step_time, prompt_tokens, cached_tokens, limit)

    def _seconds_of(self, prefill_tokens: int) -> float:
        """Of prompts of which only the tokens are known."""
        if not prefill_tokens:
            return 0.0
        return self.queued_prefill_s(_TYPICAL_PROMPT_TOKENS, 0) * prefill_tokens / _TYPICAL_PROMPT_TOKENS

    def _set_load(self, load: WorkerLoad) -> None:
        self._load = load
        self._load_at_s = self._clock.now_s()
        self._set_foreign(load)
        self._sent_requests = self._sent_kv_tokens = 0
        self._candidate = None

    def _set_foreign(self, load: WorkerLoad) -> None:
        foreign_tokens = max(0, load.waiting_prefill_tokens - self._own_prefill_tokens)
        self._prefill_queue.heard(self._clock.now_s(), self._seconds_of(foreign_tokens))
