"""One worker as a state machine: batching, KV memory, failures. Events in, effects out, no clock.

Theory of operation. A driver (the mock engine in real time, the simulator in virtual time) reports
events with their time and asks what to compute next:

    plan_step         the step to run, with its end, and the KV to pull
    finish_step       at that end: tokens and finished sequences; then plan_step again
    cut_step          before an event is reported while several decode steps run in a row: hands out
                      the tokens so far and leaves in flight only the step under way, so that the event
                      takes part in the next plan
    next_deadline_s   when leases end or a stall is over: an event of the worker's own

Every sequence is in one stage::

    submit -> WAITING ------------------> PREFILLING -> DECODING -> DONE    abort: DONE from any stage
                 |                          ^
                 '--> PULLING --> READY ----'       if its KV is on another worker
                 ^
                 '--- PREFILLING, DECODING          preempted: the KV is dropped and computed again
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from core.errors import Draining, Overloaded, WorkerLost
from core.kv_pins import KvPins
from core.performance_model import StepTime
from core.prefix_cache import BlockHash
from core.scheduler import Schedule, Scheduler
from core.sequence_state import SequenceState, Stage
from core.types import WorkerLoad
from core.worker_events import (
    Finished,
    Plan,
    Prefilled,
    SequenceSpec,
    Step,
    StepResult,
    WorkerModelConfig,
)

_NOTHING = Plan()


class WorkerModel:
    """One worker. Times are seconds on the driver's clock and never go back.

    Args:
        config: the worker's limits.
        step_time: how long its steps take.
    """

    def __init__(self, config: WorkerModelConfig, step_time: StepTime) -> None:
        self.config = config
        self._step_time = step_time
        self._dead = False
        self._draining = False
        self._now_s = float("-inf")
        self._stall_end_s = float("-inf")
        self._num_arrivals = 0
        self._clear()

    def _clear(self) -> None:
        self._scheduler = Scheduler(self.config)
        self._pins = KvPins(self._scheduler.blocks)
        self._sequences: dict[str, SequenceState] = {}
        self._pulling: dict[str, SequenceState] = {}
        """Sequences with a pull under way, aborted ones too: their blocks are being written."""
        self._waiting_prefill_tokens = 0
        self._step: Step | None = None

    # ------------------------------------------------------------------------------------- events

    def submit(self, now_s: float, spec: SequenceSpec) -> None:
        """Queues a sequence.

        Raises:
            ValueError: it can never run here, or its id is taken.
            core.errors.Draining: the worker takes nothing new.
            core.errors.Overloaded: ``max_num_waiting`` sequences wait already.
            core.errors.WorkerLost: the worker is dead.
        """
        self._advance(now_s)
        if self._dead:
            raise WorkerLost("the worker is dead")
        if self._draining:
            raise Draining("the worker is draining")
        self._check(spec)
        if 0 < self.config.max_num_waiting <= self._scheduler.num_waiting:
            raise Overloaded(f"{self._scheduler.num_waiting} sequences wait already")
        seq = SequenceState(
            spec=spec, order=self._num_arrivals, arrival_s=now_s, remote_tokens=spec.remote_tokens
        )
        self._num_arrivals += 1
        self._sequences[spec.request_id] = seq
        self._waiting_prefill_tokens += spec.num_prompt_tokens
        self._scheduler.add(seq)

    def abort(self, now_s: float, request_id: str) -> bool:
        """Ends a sequence and frees its KV, once a pull under way has ended; False if it is not here."""
        self._advance(now_s)
        seq = self._sequences.pop(request_id, None)
        if seq is None:
            return False
        if not seq.num_emitted:
            self._waiting_prefill_tokens -= seq.spec.num_prompt_tokens
        self._scheduler.remove(seq)
        return True

    def kv_arrived(self, now_s: float, request_id: str, *, ok: bool) -> None:
        """A pull has ended; ``ok=False``: its tokens will be recomputed."""
        self._advance(now_s)
        if not self._dead:
            self._scheduler.end_pull(self._pulling.pop(request_id), ok=ok)

    def release(self, now_s: float, request_id: str) -> bool:
        """Frees KV pinned for a pull; False if none is."""
        self._advance(now_s)
        return self._pins.release(request_id)

    def renew(self, now_s: float, request_id: str, lease_s: float) -> float | None:
        """Extends a lease to ``lease_s`` from now; returns when it ends, None if nothing is pinned."""
        self._advance(now_s)
        return self._pins.renew(request_id, now_s + lease_s)

    def expire_leases(self, now_s: float) -> list[str]:
        """Frees KV whose lease has ended; returns whose it was."""
        self._advance(now_s)
        return self._pins.expire(now_s)

    def set_draining(self, now_s: float, draining: bool) -> None:
        """While draining the worker finishes what it has and refuses new sequences."""
        self._advance(now_s)
        self._draining = draining

    def stall(self, now_s: float, duration_s: float) -> None:
        """Failure on demand: nothing is computed for ``duration_s``; the step in flight ends later."""
        self._advance(now_s)
        if self._step is None:
            self._stall_end_s = max(now_s, self._stall_end_s) + duration_s
            return
        num_past = bisect_left(self._step.ends_s, now_s)
        past_s, rest_s = self._step.ends_s[:num_past], self._step.ends_s[num_past:]
        self._step = replace(self._step, ends_s=(*past_s, *(end_s + duration_s for end_s in rest_s)))

    def fail(self, now_s: float) -> list[str]:
        """Failure on demand: the worker dies; returns the sequences that are lost with it."""
        self._advance(now_s)
        lost = list(self._sequences)
        self._clear()
        self._dead = True
        return lost

    # -------------------------------------------------------------------------------------- steps

    def plan_step(self, now_s: float, max_decode_steps: int = 1) -> Plan:
        """Decides what to compute from now on. No step may be in flight.

        Args:
            now_s: when the step starts.
            max_decode_steps: how many steps may be planned at once while only decodes run and none
                of them finishes; the driver then calls ``cut_step`` before each event.
        """
        self._advance(now_s)
        assert self._step is None, "a step is in flight"
        if self._dead or now_s < self._stall_end_s or self._scheduler.idle:
            return _NOTHING
        schedule = self._scheduler.schedule(now_s)
        for pull in schedule.pulls:
            self._pulling[pull.request_id] = self._sequences[pull.request_id]
        # After a preemption the next schedule differs even if nothing happens.
        self._step = self._make_step(now_s, schedule, 1 if schedule.preempted else max_decode_steps)
        return Plan(
            step=self._step,
            pulls=tuple(schedule.pulls),
            unneeded_pulls=tuple(schedule.unneeded_pulls),
            preempted=tuple(schedule.preempted),
        )

    def _make_step(self, now_s: float, schedule: Schedule, max_decode_steps: int) -> Step | None:
        decodes = self._scheduler.decodes
        num_decoding, kv_tokens = len(decodes), decodes.kv_tokens
        ends_s: Sequence[float]
        if prefills := schedule.prefills:
            # Attention kernels run a one-token chunk as a decode.
            long = [chunk for chunk in prefills if chunk.num_tokens > 1]
            if num_short := len(prefills) - len(long):
                kv_tokens += sum([chunk.context_tokens for chunk in prefills if chunk.num_tokens == 1])
            ends_s = (now_s + self._step_time.step_s(long, num_decoding + num_short, kv_tokens),)
        elif num_decoding:
            num_steps = self._scheduler.num_uniform_steps(max_decode_steps)
            ends_s = self._step_time.decode_ends_s(now_s, num_decoding, kv_tokens, num_steps)
        else:
            return None
        return Step(start_s=now_s, ends_s=ends_s, prefills=tuple(prefills), num_decoding=num_decoding)

    def cut_step(self, now_s: float) -> StepResult | None:
        """Hands out the decode steps in flight that ended before ``now_s``, drops those not begun."""
        self._advance(now_s)
        step = self._step
        assert step is not None, "no step is in flight"
        ends_s = step.ends_s
        if len(ends_s) == 1:
            return None
        num_past = min(bisect_left(ends_s, now_s), len(ends_s) - 1)
        self._step = Step(
            start_s=ends_s[num_past - 1] if num_past else step.start_s,
            ends_s=(ends_s[num_past],),
            prefills=(),
            num_decoding=step.num_decoding,
        )
        if not num_past:
            return None
        decoded = self._scheduler.decodes.request_ids()
        finished = self._scheduler.finish_decodes(num_past)
        assert not finished, "only the last of several steps finishes a sequence"
        return StepResult(ends_s=ends_s[:num_past], decoded=decoded, prefilled=(), finished=())

    def finish_step(self, now_s: float) -> StepResult:
        """The step in flight has ended: hands out its tokens."""
        self._advance(now_s)
        step, self._step = self._step, None
        assert step is not None, "no step is in flight"
        assert now_s >= step.end_s, "the step has not ended"
        decoded = self._scheduler.decodes.request_ids()
        done = self._scheduler.finish_decodes(len(step.ends_s))
        prefilled: list[Prefilled] = []
        if step.prefills:
            seqs = self._scheduler.finish_prefills()
            done += [seq for seq in seqs if seq.stage is Stage.PREFILLING]
            prefilled = [self._on_prefilled(now_s, seq) for seq in seqs]
        return StepResult(
            ends_s=step.ends_s,
            decoded=decoded,
            prefilled=tuple(prefilled),
            finished=tuple([self._on_finished(now_s, seq) for seq in done]) if done else (),
        )

    def _on_prefilled(self, now_s: float, seq: SequenceState) -> Prefilled:
        assert seq.scheduled_s is not None
        if seq.num_emitted == 1:
            self._waiting_prefill_tokens -= seq.spec.num_prompt_tokens
        return Prefilled(
            request_id=seq.spec.request_id,
            resumed=seq.num_emitted > 1,
            num_cached_tokens=seq.num_cached_tokens,
            queue_s=seq.scheduled_s - seq.arrival_s,
            prefill_s=now_s - seq.scheduled_s,
        )

    def _on_finished(self, now_s: float, seq: SequenceState) -> Finished:
        del self._sequences[seq.spec.request_id]
        seq.stage = Stage.DONE
        keep_kv = seq.spec.keep_kv
        finished = Finished(
            request_id=seq.spec.request_id,
            num_tokens=seq.num_emitted,
            num_preemptions=seq.num_preemptions,
            pinned_tokens=seq.kv_tokens if keep_kv else 0,
            lease_end_s=now_s + self.config.lease_s if keep_kv else None,
        )
        if finished.lease_end_s is None:
            self._scheduler.blocks.free(seq)
        else:
            self._pins.pin(seq, finished.lease_end_s)
        return finished

    # -------------------------------------------------------------------------------------- views

    @property
    def step(self) -> Step | None:
        """The step in flight."""
        return self._step

    @property
    def dead(self) -> bool:
        return self._dead

    @property
    def drained(self) -> bool:
        """No sequence is here, no KV is pinned, no pull is under way."""
        return not (self._sequences or self._pins or self._pulling)

    def note_cache_changes(self) -> None:
        """From now on ``take_cache_changes`` says what the prefix cache does."""
        self._scheduler.blocks.cache.changes = []

    def take_cache_changes(self) -> list[tuple[BlockHash, bool]]:
        """Pieces that became resident (True) or were evicted (False) since the last call, in order."""
        cache = self._scheduler.blocks.cache
        if not cache.changes:
            return []
        changes, cache.changes = cache.changes, []
        return changes

    def next_deadline_s(self) -> float | None:
        """When the next lease ends or a stall is over: expire leases then, and plan if nothing runs."""
        lease_end_s = self._pins.next_lease_end_s()
        if self._stall_end_s <= self._now_s:
            return lease_end_s
        return self._stall_end_s if lease_end_s is None else min(self._stall_end_s, lease_end_s)

    def load(self, now_s: float) -> WorkerLoad:
        """The load at ``now_s``, exact also between the decode steps in flight."""
        scheduler, step = self._scheduler, self._step
        num_waiting, kv_used_blocks = scheduler.num_waiting, scheduler.blocks.num_used
        if step is not None and (num_past := bisect_left(step.ends_s, now_s)):
            kv_used_blocks += scheduler.decodes.num_new_blocks(num_past)
        return WorkerLoad(
            num_running=len(self._sequences) - num_waiting,
            num_decoding=len(scheduler.decodes),
            num_waiting=num_waiting,
            waiting_prefill_tokens=self._waiting_prefill_tokens,
            kv_used_blocks=kv_used_blocks,
            num_pinned=len(self._pins),
        )

    # --------------------------------------------------------------------------------- invariants

    def _advance(self, now_s: float) -> None:
        assert now_s >= self._now_s, f"time went back by {self._now_s - now_s} s"
        self._now_s = now_s

    def _check(self, spec: SequenceSpec) -> None:
        request_id = spec.request_id
        if request_id in self._sequences or request_id in self._pulling or request_id in self._pins:
            raise ValueError(f"request id {request_id!r} is taken")
        num_tokens = spec.num_prompt_tokens + spec.max_tokens - 1
        if num_tokens > self.config.kv_capacity_tokens:
            raise ValueError(
                f"prompt and answer need {num_tokens} tokens of KV, the worker has "
                f"{self.config.kv_capacity_tokens}"
            )
