"""One worker's load as one router knows it: the last word of it, plus what was sent since."""

from __future__ import annotations

from core.types import WorkerLoad, WorkerReport
from router.policy import Candidate


class WorkerView:
    """Turns reports and piggybacked loads into what the routing policy chooses from."""

    __slots__ = (
        "_candidate",
        "_heard",
        "_load",
        "_sent_kv_tokens",
        "_sent_prefill_tokens",
        "_sent_requests",
        "report",
    )

    def __init__(self, report: WorkerReport) -> None:
        self.report = report
        self._heard = False
        self._candidate: Candidate | None = None
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

    def count(self, *, prefill_tokens: int = 0, kv_tokens: int = 0) -> None:
        """Notes a request that is being sent; counts until the worker's next word."""
        self._sent_requests += 1
        self._sent_prefill_tokens += prefill_tokens
        self._sent_kv_tokens += kv_tokens
        self._candidate = None

    def candidate(self) -> Candidate:
        """The worker as the policy sees it now."""
        if self._candidate is None:
            report, load = self.report, self._load
            self._candidate = Candidate(
                worker_id=report.worker_id,
                revision=report.revision,
                role=report.role,
                num_requests=load.num_running + load.num_waiting + self._sent_requests,
                waiting_prefill_tokens=load.waiting_prefill_tokens + self._sent_prefill_tokens,
                kv_used_tokens=load.kv_used_blocks * report.block_size_tokens + self._sent_kv_tokens,
                kv_capacity_tokens=report.kv_capacity_tokens,
            )
        return self._candidate

    def _set_load(self, load: WorkerLoad) -> None:
        self._load = load
        self._sent_requests = self._sent_prefill_tokens = self._sent_kv_tokens = 0
        self._candidate = None
