"""One simulated router: the real routing policy, on what a real router would know of the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np

from core.step_times import StepTimes
from core.types import WorkerLoad, WorkerReport
from router.placement import Placement, judge
from router.prefix_guess import PrefixKnowledge
from router.routing import Candidate, Decision, RoutingPolicy, RoutingRequest
from router.worker_view import WorkerView
from simulator.event_queue import EventQueue
from simulator.gate import Gate
from simulator.router_traffic import RouterTraffic
from simulator.traces.trace import TraceRequest
from simulator.worker import CacheChanges

_MAX_PIECES = 2_000_000
"""Of prompts, known at a time."""


class SimulatedRouter:
    """Views of the workers in the last snapshot, less those whose connection broke since.

    Args:
        gate: where requests wait; None: they do not.
        num_routers: of the cluster.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        queue: EventQueue,
        step_times: StepTimes,
        gate: Gate | None = None,
        num_routers: int = 1,
        router_id: str = "0",
    ) -> None:
        self.traffic = RouterTraffic(router_id)
        self._num_routers = num_routers
        self.num_ongoing = 0
        """Requests in flight."""
        self.gate = gate
        self._policy = policy
        self._queue = queue
        self._step_times = step_times
        self._views: dict[str, WorkerView] = {}
        self._candidates: dict[str, Candidate] = {}
        self._changed: dict[str, None] = {}
        """Workers whose candidates are out of date..."""
        self._drifting: dict[str, None] = {}
        """...and those whose candidates are so whenever time has passed..."""
        self._drifted_at_s = 0.0
        """...since then."""
        self._prefixes = PrefixKnowledge(max_blocks=_MAX_PIECES)

    def now_s(self) -> float:
        """The virtual clock, for the parts that read one."""
        return self._queue.now_s

    def on_report(self, report: WorkerReport) -> None:
        """A snapshot brings news of a worker."""
        self._news_of(report.worker_id)
        view = self._views.get(report.worker_id)
        if view is None or view.report.incarnation != report.incarnation:
            view = self._views[report.worker_id] = WorkerView(report, self, self._step_times)
            view.num_routers = self._num_routers
            self._prefixes.remove_worker(report.worker_id)
            self._prefixes.set_worker(report.worker_id, report.num_kv_blocks)
            self._prefixes.replace(report.worker_id, np.empty(0, dtype=np.uint64))
        else:
            view.on_report(report)

    def on_load(self, worker_id: str, load: WorkerLoad) -> None:
        """A worker piggybacked its load on an answer."""
        if (view := self._views.get(worker_id)) is not None:
            self._news_of(worker_id)
            view.on_load(load)

    def on_cache_changes(self, worker_id: str, changes: CacheChanges) -> None:
        """A worker's prefix cache has changed: pieces came (True) and went (False), in this order."""
        if worker_id not in self._views:
            return
        for came, run in groupby(changes, key=itemgetter(1)):
            states = np.array([piece for piece, _ in run], dtype=np.uint64)
            (self._prefixes.store if came else self._prefixes.evict)(worker_id, states)

    def forget(self, worker_id: str) -> None:
        """The connection to a worker broke, or it left."""
        self._views.pop(worker_id, None)
        self._news_of(worker_id)
        self._prefixes.remove_worker(worker_id)

    def cached_tokens(self, request: TraceRequest, piece_tokens: int) -> Mapping[str, int]:
        """How many leading prompt tokens each worker has cached, as far as this router can tell."""
        if not request.block_hashes:
            return {}
        states = np.array(request.block_hashes, dtype=np.uint64)
        matched = self._prefixes.match(states, self._queue.now_s)
        return {worker_id: piece_tokens * num for worker_id, num in matched.items()}

    def prefix_sent(self, worker_id: str, request: TraceRequest) -> None:
        """A worker will soon hold the prompt's pieces."""
        if request.block_hashes and worker_id in self._views:
            states = np.array(request.block_hashes, dtype=np.uint64)
            self._prefixes.sent(worker_id, states, self._queue.now_s)

    def prefill_sent(self, worker_id: str, request_id: str, prompt_tokens: int, cached_tokens: int) -> None:
        """A prompt is being sent."""
        if (view := self._views.get(worker_id)) is not None:
            self._changed[worker_id] = None
            predicted_s = view.queued_prefill_s(prompt_tokens, cached_tokens)
            view.prefill_sent(request_id, prompt_tokens, predicted_s, cached_tokens=cached_tokens)

    def prefill_ended(self, worker_id: str, request_id: str) -> None:
        """Its answer is here, or none will come."""
        if (view := self._views.get(worker_id)) is not None:
            self._news_of(worker_id)
            view.prefill_ended(request_id)

    def decode_sent(self, worker_id: str, kv_tokens: int, computed_tokens: int, cached_tokens: int) -> None:
        """A decode leg is being sent; the worker computes ``computed_tokens`` of the prompt itself."""
        if (view := self._views.get(worker_id)) is not None:
            self._changed[worker_id] = None
            local_s = 0.0
            if computed_tokens:
                local_s = view.predicted_prefill_s(cached_tokens + computed_tokens, cached_tokens)
            view.decode_sent(kv_tokens, local_s)

    def decode_expected(
        self, worker_id: str, request_id: str, kv_tokens: int, in_s: float | None = None
    ) -> None:
        """A prompt is being sent elsewhere that will be decoded here."""
        if (view := self._views.get(worker_id)) is not None:
            self._changed[worker_id] = None
            view.decode_expected(request_id, kv_tokens, in_s)

    def decode_expected_no_more(self, worker_id: str, request_id: str) -> None:
        """Its decode leg is being sent, or none will come."""
        if (view := self._views.get(worker_id)) is not None:
            self._news_of(worker_id)
            view.decode_expected_no_more(request_id)

    def choose(self, request: RoutingRequest, tried: Sequence[str]) -> Decision:
        """
        Raises:
            core.errors.NoWorkerAvailable: no worker can decode.
        """
        return self._policy.choose(self._usable(), request, tried)

    def choose_prefill_only(self, request: RoutingRequest, tried: Sequence[str]) -> str:
        """
        Raises:
            core.errors.NoWorkerAvailable: there is no worker at all.
        """
        return self._policy.choose_prefill_only(self._usable(), request, tried)

    def judge(self, decision: Decision, request: RoutingRequest, gate: Gate, tpot_slo_s: float) -> Placement:
        """Whether the workers of a decision made just now have room."""
        return judge(
            decision,
            self._candidates,
            request,
            gate.limits,
            tpot_slo_s=tpot_slo_s,
        )

    def _news_of(self, worker_id: str) -> None:
        self._changed[worker_id] = None
        if self.gate is not None:
            self.gate.news()

    def _usable(self) -> list[Candidate]:
        """Workers that a request can be sent to now; only those that changed are looked at again."""
        drift_matters = self._policy.predicts or self.gate is not None
        if self._queue.now_s > self._drifted_at_s:
            self._drifted_at_s = self._queue.now_s
            self._changed = self._drifting | self._changed
        for worker_id in self._changed:
            view = self._views.get(worker_id)
            self._drifting.pop(worker_id, None)
            if view is None or view.report.draining:
                self._candidates.pop(worker_id, None)
            else:
                self._candidates[worker_id] = view.candidate()
                if drift_matters and view.drifts:
                    self._drifting[worker_id] = None
        self._changed = {}
        return list(self._candidates.values())
