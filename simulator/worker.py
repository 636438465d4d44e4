"""One simulated worker: core's worker model on the virtual clock."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from core.errors import Draining, Overloaded
from core.prefix_cache import BlockHash
from core.types import Role, WorkerLoad, WorkerReport
from core.worker_events import Finished, KvPull, Prefilled, SequenceSpec, StepResult
from core.worker_model import WorkerModel
from decode_workers.reservations import Reservations
from simulator.event_queue import EventQueue
from simulator.links import WorkerLink
from simulator.recorder import Recorder
from simulator.role_step_time import RoleStepTime
from simulator.spec import WorkerGroup

_MIN_STEPS, _MAX_STEPS = 8, 256
"""Decode steps planned together: twice as many as the last time, fewer if an event cut them."""
_QUEUE_FACTOR = 4
"""Requests a worker holds at most, in batches (``deploy/worker_replica.py``)."""
_RESERVATION_TTL_S = 60.0
_SAMPLE_EVERY = 2
"""Heartbeats of which one tells of steps: enough to learn from, and cheap."""
_NEVER = float("inf")


CacheChanges = list[tuple[BlockHash, bool]]
"""Pieces of the prefix cache that became resident (True) or were evicted (False), in order."""


class Leg(Protocol):
    """What a worker tells of one sequence."""

    def on_pull(self, now_s: float, pull: KvPull) -> None:
        """Its remote KV is to be moved now."""

    def on_unneeded_pull(self, now_s: float) -> None:
        """Its remote KV is in this worker's cache already."""

    def on_prefilled(self, now_s: float, prefilled: Prefilled) -> None:
        """It got a token from a prefill: its first one here, or the next one after a preemption."""

    def on_preempted(self, last_token_s: float) -> None:
        """It lost its KV; its last token came at ``last_token_s``."""

    def on_finished(self, now_s: float, worker: SimulatedWorker, finished: Finished) -> None:
        """It has all its tokens."""

    def on_lost(self, now_s: float) -> None:
        """The worker died with it."""

    def on_silent(self, now_s: float, worker: SimulatedWorker) -> None:
        """The worker has computed nothing for the stall timeout."""


class Watcher(Protocol):
    """A router with an open stream of tokens."""

    def on_load(self, worker_id: str, load: WorkerLoad) -> None: ...


class SimulatedWorker:
    """One worker start. Callbacks of its legs must not call it back within the same event."""

    def __init__(
        self,
        worker_id: str,
        incarnation: str,
        group: WorkerGroup,
        role: Role,
        queue: EventQueue,
        recorder: Recorder,
    ) -> None:
        self.worker_id = worker_id
        self.group = group
        self.role = role
        self.draining = False
        self.failing_pulls_until_s = float("-inf")
        self.slow_link_until_s = float("-inf")
        self.stalled_since_s = float("-inf")
        self.stalled_until_s = float("-inf")
        self.link = WorkerLink(group.link)
        self.step_time = RoleStepTime(group, role)
        self.model = WorkerModel(group.worker, self.step_time)
        self.reservations = Reservations(group.worker.kv_capacity_tokens, _RESERVATION_TTL_S, self)
        self.changed = True
        """True if something happened since the last heartbeat."""
        self.reported_change = False
        """True if the last heartbeat told of a change."""
        self.legs: dict[str, Leg] = {}
        self.watchers: Counter[Watcher] = Counter()
        """Routers that get tokens from here, and with them its load; with how many requests."""
        self.num_steps = 0
        """Steps done; whoever decodes got a token at each."""
        self.on_cache_changes: Callable[[SimulatedWorker, CacheChanges], None] | None = None
        """Told what the prefix cache does, once ``model.note_cache_changes`` has been called."""
        self.kept_pins: set[str] = set()
        """Pinned KV whose lease a living decode worker renews."""
        self._incarnation = incarnation
        self._num_heartbeats = 0
        self._queue = queue
        self._recorder = recorder
        self._last_token_s = 0.0
        self._wake_s = _NEVER
        self._num_wakes = 0
        self._num_steps_at_once = _MIN_STEPS

    def now_s(self) -> float:
        """The virtual clock, for the parts that read one."""
        return self._queue.now_s

    @property
    def dead(self) -> bool:
        return self.model.dead

    # ------------------------------------------------------------------------------------ events

    def check(self) -> None:
        """
        Raises:
            core.errors.Draining: it takes nothing new.
            core.errors.Overloaded: it holds too many requests already.
        """
        if self.draining:
            raise Draining("the worker is draining")
        if len(self.legs) >= _QUEUE_FACTOR * self.group.worker.max_num_seqs:
            raise Overloaded(f"the worker already holds {len(self.legs)} requests")

    def submit(self, spec: SequenceSpec, leg: Leg, *, promised: bool = False) -> None:
        """
        Args:
            promised: room was promised to it, which is kept whatever :meth:`check` says.

        Raises:
            core.errors.RequestRefused: draining, or too many requests already.
            core.errors.WorkerLost: it is dead.
            ValueError: the sequence can never run here.
        """
        if not promised:
            self.check()
        self._begin()
        try:
            self.model.submit(self._queue.now_s, spec)
            self.legs[spec.request_id] = leg
        finally:
            self._end()

    def abort(self, request_id: str) -> None:
        self._begin()
        self.model.abort(self._queue.now_s, request_id)
        self.legs.pop(request_id, None)
        self._end()

    def kv_arrived(self, request_id: str, *, ok: bool) -> None:
        self._begin()
        self.model.kv_arrived(self._queue.now_s, request_id, ok=ok)
        self._end()

    def release(self, request_id: str) -> None:
        self._begin()
        self.model.release(self._queue.now_s, request_id)
        self._end()

    def set_draining(self) -> None:
        """From now on it takes nothing new, but keeps its promises."""
        self.draining = True
        self.changed = True

    def set_role(self, role: Role) -> None:
        self._begin()
        self.role = role
        self.step_time.set_role(role)
        self._end()

    def stall(self, duration_s: float) -> None:
        now_s = self._queue.now_s
        if now_s >= self.stalled_until_s:
            self.stalled_since_s = self.stalled_until_s = now_s
        self.stalled_until_s += duration_s
        self._begin()
        self.model.stall(now_s, duration_s)
        self._end()

    def fail(self) -> None:
        """The worker dies; its legs are told."""
        self._begin()
        legs, self.legs = self.legs, {}
        self.model.fail(self._queue.now_s)
        self._wake_s = _NEVER
        self._num_wakes += 1
        for leg in legs.values():
            leg.on_lost(self._queue.now_s)

    # ------------------------------------------------------------------------------------- views

    def num_steps_at(self, now_s: float) -> int:
        """Steps done at this moment, those among them that nobody has been told of yet."""
        step = self.model.step
        return self.num_steps + (0 if step is None else bisect_left(step.ends_s, now_s))

    def load(self) -> WorkerLoad:
        return self.model.load(self._queue.now_s)

    def report(self) -> WorkerReport:
        """Its heartbeat now."""
        config = self.group.worker
        self._num_heartbeats += 1
        return WorkerReport(
            worker_id=self.worker_id,
            incarnation=self._incarnation,
            model="",
            revision="",
            shape=self.group.shape,
            allowed_roles=self.group.allowed_roles,
            role=self.role,
            role_assigned=True,
            draining=self.draining,
            address=self.worker_id,
            node_id="",
            metrics_address="",
            block_size_tokens=config.block_size_tokens,
            num_kv_blocks=config.num_kv_blocks,
            bytes_per_block=self.group.kv_bytes_per_token * config.block_size_tokens,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            load=self.load(),
            heartbeat=self._num_heartbeats,
            steps=() if self._num_heartbeats % _SAMPLE_EVERY else self.step_time.steps.take(),
        )

    # ------------------------------------------------------------------------------------ driving

    def _begin(self) -> None:
        """Before an event: what the steps in flight have computed so far is handed out."""
        self.changed = True
        step = self.model.step
        if step is None:
            return
        num_planned = len(step.ends_s)
        if (result := self.model.cut_step(self._queue.now_s)) is not None:
            self._deliver(self._queue.now_s, result)
        if num_planned > 1:
            num_done = 0 if result is None else len(result.ends_s)
            self._num_steps_at_once = max(_MIN_STEPS, 2 * num_done)

    def _end(self) -> None:
        """After an event: the next step is planned if none is in flight."""
        if self.model.step is None and not self.model.dead:
            self._plan(self._queue.now_s)
        self._set_wake()
        if self.on_cache_changes is not None and (changes := self.model.take_cache_changes()):
            self.on_cache_changes(self, changes)

    def _set_wake(self) -> None:
        step, deadline_s = self.model.step, self.model.next_deadline_s()
        wake_s = _NEVER if step is None else step.end_s
        if deadline_s is not None and deadline_s < wake_s:
            wake_s = deadline_s
        if wake_s != self._wake_s:
            self._wake_s = wake_s
            self._num_wakes += 1
            if wake_s != _NEVER:
                self._queue.at(wake_s, self._on_wake, self._num_wakes)

    def _on_wake(self, now_s: float, wake: int) -> None:
        if wake != self._num_wakes:
            return
        self._wake_s = _NEVER
        self.changed = True
        step = self.model.step
        if step is not None and step.end_s <= now_s:
            if len(step.ends_s) == self._num_steps_at_once:
                self._num_steps_at_once = min(_MAX_STEPS, 2 * self._num_steps_at_once)
            self._deliver(now_s, self.model.finish_step(now_s))
        else:
            self._begin()
            for request_id in sorted(self.kept_pins):
                self.model.renew(now_s, request_id, self.group.worker.lease_s)
            self.model.expire_leases(now_s)
        self._end()

    def _plan(self, now_s: float) -> None:
        plan = self.model.plan_step(now_s, self._num_steps_at_once)
        for pull in plan.pulls:
            self.legs[pull.request_id].on_pull(now_s, pull)
        for request_id in plan.unneeded_pulls:
            self.legs[request_id].on_unneeded_pull(now_s)
        for request_id in plan.preempted:
            self._recorder.num_preemptions += 1
            self.legs[request_id].on_preempted(self._last_token_s)

    def _deliver(self, now_s: float, result: StepResult) -> None:
        if self.watchers:
            load = self.model.load(now_s)
            for watcher in self.watchers:
                watcher.on_load(self.worker_id, load)
        if num_decoded := len(result.decoded):
            self._recorder.gaps_in_a_row(self._last_token_s, result.ends_s, num_decoded)
        self._last_token_s = result.ends_s[-1]
        self.num_steps += len(result.ends_s)
        for prefilled in result.prefilled:
            self.legs[prefilled.request_id].on_prefilled(now_s, prefilled)
        for finished in result.finished:
            self.legs.pop(finished.request_id).on_finished(now_s, self, finished)
