"""The sequences that decode, advanced together."""

from __future__ import annotations

import heapq

from core.sequence_state import SequenceState, Stage


class DecodeBatch:
    """Sequences that each add one token a step.

    Theory of operation: a step costs the same however many sequences take part. The batch counts
    steps (ticks) and totals, and a member's own counters stay as they were when it joined until it
    leaves. Two tables, filled when a member joins, say what a tick does to whom: how many members
    begin a KV block at it (that repeats every ``block_size_tokens`` ticks) and who finishes at it.
    """

    __slots__ = ("_block_starts", "_finishes", "_members", "_num_joins", "kv_tokens", "tick")

    def __init__(self, block_size_tokens: int) -> None:
        self.tick = 0
        self.kv_tokens = 0
        """KV tokens of all members."""
        self._members: dict[str, SequenceState] = {}
        self._block_starts = [0] * block_size_tokens
        self._finishes: list[tuple[int, int, SequenceState]] = []
        self._num_joins = 0

    def __len__(self) -> int:
        return len(self._members)

    def request_ids(self) -> tuple[str, ...]:
        return tuple(self._members)

    def add(self, seq: SequenceState) -> None:
        """Takes in a sequence that has a token to extend and at least one to emit."""
        seq.joined_tick = self.tick
        self._members[seq.spec.request_id] = seq
        self._block_starts[self._block_phase(seq)] += 1
        self.kv_tokens += seq.kv_tokens
        self._num_joins += 1
        heapq.heappush(self._finishes, (self._finish_tick(seq), self._num_joins, seq))

    def remove(self, seq: SequenceState) -> None:
        """Lets a member go, its counters settled."""
        del self._members[seq.spec.request_id]
        self._block_starts[self._block_phase(seq)] -= 1
        num_steps = self.tick - seq.joined_tick
        num_blocks_before = -(-seq.kv_tokens // len(self._block_starts))
        seq.kv_tokens += num_steps
        seq.num_emitted += num_steps
        seq.num_owned += -(-seq.kv_tokens // len(self._block_starts)) - num_blocks_before
        self.kv_tokens -= seq.kv_tokens

    def num_new_blocks(self, num_steps: int) -> int:
        """KV blocks the members begin in the next steps."""
        starts = self._block_starts
        if num_steps == 1:
            return starts[self.tick % len(starts)]
        num_periods, num_rest = divmod(num_steps, len(starts))
        first = self.tick % len(starts)
        num_blocks = num_periods * len(self._members) + sum(starts[first : first + num_rest])
        if (num_wrapped := first + num_rest - len(starts)) > 0:
            num_blocks += sum(starts[:num_wrapped])
        return num_blocks

    def num_uniform_steps(self, max_steps: int, num_free_blocks: int) -> int:
        """Steps until a member finishes or the next one could lack blocks, at most ``max_steps``."""
        while self._finishes and not self._is_live(self._finishes[0]):
            heapq.heappop(self._finishes)
        num_steps = min(max_steps, self._finishes[0][0] - self.tick)
        while not self.fits(num_steps, num_free_blocks):
            num_steps //= 2
        return num_steps

    def fits(self, num_steps: int, num_free_blocks: int) -> bool:
        """Whether the next steps begin no more KV blocks than are free."""
        at_most = len(self._members) * -(-num_steps // len(self._block_starts))
        return at_most <= num_free_blocks or self.num_new_blocks(num_steps) <= num_free_blocks

    def advance(self, num_steps: int) -> list[SequenceState]:
        """Counts steps done; returns the members that finished, removed and settled."""
        self.tick += num_steps
        self.kv_tokens += num_steps * len(self._members)
        finished = []
        while self._finishes and self._finishes[0][0] <= self.tick:
            entry = heapq.heappop(self._finishes)
            if self._is_live(entry):
                assert entry[0] == self.tick, "a sequence decoded beyond its last token"
                self.remove(entry[2])
                finished.append(entry[2])
        return finished

    def last_in_rank(self) -> SequenceState:
        """The member to give up first."""
        return max(self._members.values(), key=lambda seq: seq.rank)

    def _is_live(self, entry: tuple[int, int, SequenceState]) -> bool:
        tick, _, seq = entry
        return seq.stage is Stage.DECODING and self._finish_tick(seq) == tick

    def _finish_tick(self, seq: SequenceState) -> int:
        return seq.joined_tick + seq.spec.max_tokens - seq.num_emitted

    def _block_phase(self, seq: SequenceState) -> int:
        return (seq.joined_tick - seq.kv_tokens) % len(self._block_starts)
