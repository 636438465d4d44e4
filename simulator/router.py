"""One simulated router: the real routing policy, on what a real router would know of the workers."""

from __future__ import annotations

from collections.abc import Sequence

from core.types import WorkerLoad, WorkerReport
from router.policy import Candidate, Decision, LoadBalancingPolicy
from router.worker_view import WorkerView


class SimulatedRouter:
    """Views of the workers in the last snapshot, less those whose connection broke since."""

    def __init__(self, policy: LoadBalancingPolicy) -> None:
        self.num_ongoing = 0
        """Requests in flight."""
        self._policy = policy
        self._views: dict[str, WorkerView] = {}

    def on_report(self, report: WorkerReport) -> None:
        """A snapshot brings news of a worker."""
        view = self._views.get(report.worker_id)
        if view is None or view.report.incarnation != report.incarnation:
            self._views[report.worker_id] = WorkerView(report)
        else:
            view.on_report(report)

    def on_load(self, worker_id: str, load: WorkerLoad) -> None:
        """A worker piggybacked its load on an answer."""
        if (view := self._views.get(worker_id)) is not None:
            view.on_load(load)

    def forget(self, worker_id: str) -> None:
        """The connection to a worker broke, or it left."""
        self._views.pop(worker_id, None)

    def count(self, worker_id: str, *, prefill_tokens: int = 0, kv_tokens: int = 0) -> None:
        """Notes a request that is being sent."""
        if (view := self._views.get(worker_id)) is not None:
            view.count(prefill_tokens=prefill_tokens, kv_tokens=kv_tokens)

    def choose(self, prompt_tokens: int, tried: Sequence[str]) -> Decision:
        """
        Raises:
            core.errors.NoWorkerAvailable: no worker can decode.
        """
        return self._policy.choose(self._candidates(), prompt_tokens, tried)

    def choose_prefill_only(self, tried: Sequence[str]) -> str:
        """
        Raises:
            core.errors.NoWorkerAvailable: there is no worker at all.
        """
        return self._policy.choose_prefill_only(self._candidates(), tried)

    def _candidates(self) -> list[Candidate]:
        return [view.candidate() for view in self._views.values() if not view.report.draining]
