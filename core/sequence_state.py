"""One sequence inside a worker model, and the queue sequences wait in."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from enum import Enum

from core.prefix_cache import BlockHash
from core.worker_events import SequenceSpec


class Stage(Enum):
    """Where a sequence is; see ``core/worker_model.py`` for the moves between stages."""

    WAITING = "waiting"
    PULLING = "pulling"
    READY = "ready"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    DONE = "done"


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceState:
    """Counters of one sequence. While it decodes they lag; ``DecodeBatch`` settles them."""

    spec: SequenceSpec
    order: int
    """Rank of arrival."""
    arrival_s: float
    stage: Stage = Stage.WAITING
    num_emitted: int = 0
    kv_tokens: int = 0
    """Tokens whose KV is in this worker's blocks, or will be at the end of the step in flight."""
    num_owned: int = 0
    """KV blocks held alone."""
    shared: list[BlockHash] = field(default_factory=list)
    """Pieces of the prefix cache held with others."""
    num_published: int = 0
    """Leading hashes whose pieces were offered to the prefix cache or came from it."""
    remote_tokens: int = 0
    """Prompt tokens still worth pulling; 0 once pulled or lost."""
    joined_tick: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    scheduled_s: float | None = None
    """When it was first scheduled."""

    @property
    def num_tokens(self) -> int:
        """Prompt and emitted tokens: what must be computed before the next token."""
        return self.spec.num_prompt_tokens + self.num_emitted

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first."""
        return self.spec.priority, self.order


class WaitingQueue:
    """Sequences of one stage by rank. One that leaves the stage by itself is skipped at the head."""

    __slots__ = ("_heap", "_stage")

    def __init__(self, stage: Stage) -> None:
        self._heap: list[tuple[int, int, SequenceState]] = []
        self._stage = stage

    def push(self, seq: SequenceState) -> None:
        heapq.heappush(self._heap, (*seq.rank, seq))

    def head(self) -> SequenceState | None:
        while self._heap:
            seq = self._heap[0][2]
            if seq.stage is self._stage:
                return seq
            heapq.heappop(self._heap)
        return None

    def pop(self) -> SequenceState:
        """Removes the head that ``head`` returned."""
        return heapq.heappop(self._heap)[2]
