"""Which sequences of a worker run in the next step, and what its end means for them.

Follows vllm/v1/core/sched/scheduler.py: a step has a token budget; running sequences come first, then
those whose KV has arrived, then the waiting ones by priority and arrival, none overtaking one that
lacks room. Unlike there, a prompt's blocks are all taken when it is admitted, so that only decoding can
run out of blocks; then the running sequence last in rank is preempted and computed again later.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.decode_batch import DecodeBatch
from core.kv_blocks import KvBlocks
from core.performance_model import PrefillChunk
from core.sequence_state import SequenceState, Stage, WaitingQueue
from core.worker_events import KvPull, WorkerModelConfig


@dataclass(slots=True, kw_only=True)
class Schedule:
    """What one step runs beside the decodes, and what was decided on the way."""

    prefills: list[PrefillChunk] = field(default_factory=list)
    pulls: list[KvPull] = field(default_factory=list)
    unneeded_pulls: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)


_ONLY_DECODES = Schedule()
"""What most steps are; nobody changes it."""


class Scheduler:
    """Queues, batch and KV memory of one worker.

    Args:
        config: the worker's limits.
    """

    def __init__(self, config: WorkerModelConfig) -> None:
        self.blocks = KvBlocks(
            config.num_kv_blocks,
            config.block_size_tokens,
            config.hash_block_tokens or config.block_size_tokens,
        )
        self.decodes = DecodeBatch(config.block_size_tokens)
        self.num_waiting = 0
        """Sequences that wait, for room or for their KV."""
        self._config = config
        self._waiting = WaitingQueue(Stage.WAITING)
        self._ready = WaitingQueue(Stage.READY)
        self._partial: SequenceState | None = None
        """The sequence between two chunks of its prompt: the budget leaves room for one at most."""
        self._chunked: list[SequenceState] = []
        """Sequences with a chunk in the step in flight."""

    @property
    def idle(self) -> bool:
        """Nothing waits or runs: there is nothing to schedule."""
        return not (self.num_waiting or self.decodes or self._partial)

    def add(self, seq: SequenceState) -> None:
        """Queues a new sequence."""
        self.num_waiting += 1
        self._waiting.push(seq)

    def remove(self, seq: SequenceState) -> None:
        """Drops a sequence; a pull under way keeps its blocks until ``end_pull``."""
        if seq.stage is Stage.DECODING:
            self.decodes.remove(seq)
        elif seq.stage is not Stage.PREFILLING:
            self.num_waiting -= 1
        if seq is self._partial:
            self._partial = None
        if seq.stage is not Stage.PULLING:
            self.blocks.free(seq)
        seq.stage = Stage.DONE

    def end_pull(self, seq: SequenceState, *, ok: bool) -> None:
        """The pull of a sequence has ended; it is ready to run, unless it was dropped meanwhile."""
        if seq.stage is Stage.DONE:
            self.blocks.free(seq)
            return
        if ok:
            # If all its tokens came, the last is computed again: the next one is sampled from it.
            seq.kv_tokens = min(seq.kv_tokens + seq.remote_tokens, seq.num_tokens - 1)
            self.blocks.publish(seq)
        seq.remote_tokens = 0
        seq.stage = Stage.READY
        self._ready.push(seq)

    def schedule(self, now_s: float) -> Schedule:
        """Composes the next step, which starts now."""
        if not (self.num_waiting or self._partial) and self.decodes.fits(1, self.blocks.num_free):
            return _ONLY_DECODES
        schedule = Schedule()
        self._make_room_for_decodes(schedule)
        budget = self._config.max_num_batched_tokens - len(self.decodes)
        if self._partial is not None:
            budget -= self._add_chunk(now_s, self._partial, budget, schedule)
            self._partial = None
        # What was preempted must not take back the room that was made.
        if self.num_waiting and (not schedule.preempted or not (self._chunked or self.decodes)):
            self._admit(now_s, budget, schedule)
        return schedule

    def num_uniform_steps(self, max_steps: int) -> int:
        """Decode steps in a row that need no new schedule."""
        return self.decodes.num_uniform_steps(max_steps, self.blocks.num_free)

    def finish_decodes(self, num_steps: int) -> list[SequenceState]:
        """Counts the decode steps done; returns the sequences with all their tokens."""
        if not self.decodes:
            return []
        self.blocks.take(self.decodes.num_new_blocks(num_steps))
        return self.decodes.advance(num_steps)

    def finish_prefills(self) -> list[SequenceState]:
        """Returns the sequences whose chunk was their last: each has one more token."""
        prefilled = []
        for seq in self._chunked:
            if seq.stage is Stage.DONE:
                continue
            if seq.kv_tokens < seq.num_tokens:
                self._partial = seq
                continue
            seq.num_emitted += 1
            prefilled.append(seq)
            if seq.num_emitted < seq.spec.max_tokens:
                seq.stage = Stage.DECODING
                self.decodes.add(seq)
        self._chunked.clear()
        return prefilled

    def _make_room_for_decodes(self, schedule: Schedule) -> None:
        while not self.decodes.fits(1, self.blocks.num_free):
            victim = self.decodes.last_in_rank()
            if self._partial is not None and self._partial.rank > victim.rank:
                victim, self._partial = self._partial, None
            else:
                self.decodes.remove(victim)
            self.blocks.free(victim)
            victim.stage = Stage.WAITING
            victim.num_preemptions += 1
            schedule.preempted.append(victim.spec.request_id)
            self.add(victim)

    def _admit(self, now_s: float, budget: int, schedule: Schedule) -> None:
        while budget > 0 and len(self.decodes) + len(self._chunked) < self._config.max_num_seqs:
            if (seq := self._ready.head()) is not None:
                self._ready.pop()
            elif (seq := self._waiting.head()) is not None and self._place(seq):
                self._waiting.pop()
                if seq.remote_tokens:
                    seq.stage = Stage.PULLING
                    schedule.pulls.append(
                        KvPull(request_id=seq.spec.request_id, num_tokens=seq.remote_tokens)
                    )
                    continue
                if seq.spec.remote_tokens and not seq.num_preemptions:
                    schedule.unneeded_pulls.append(seq.spec.request_id)
            else:
                break
            self.num_waiting -= 1
            budget -= self._add_chunk(now_s, seq, budget, schedule)

    def _place(self, seq: SequenceState) -> bool:
        """Gives a waiting sequence its blocks, if there is room beside the decodes' next step."""
        if not self.blocks.admit(seq, num_reserved=self.decodes.num_new_blocks(1)):
            return False
        seq.remote_tokens = max(0, seq.remote_tokens - seq.kv_tokens)
        return True

    def _add_chunk(self, now_s: float, seq: SequenceState, budget: int, schedule: Schedule) -> int:
        if seq.scheduled_s is None:
            seq.scheduled_s = now_s
            seq.num_cached_tokens = seq.kv_tokens
        num_missing = seq.num_tokens - seq.kv_tokens
        num_tokens = min(num_missing, budget)
        schedule.prefills.append(
            PrefillChunk(
                context_tokens=seq.kv_tokens, num_tokens=num_tokens, ends_prompt=num_tokens == num_missing
            )
        )
        seq.stage = Stage.PREFILLING
        seq.kv_tokens += num_tokens
        self.blocks.publish(seq)
        self._chunked.append(seq)
        return num_tokens
