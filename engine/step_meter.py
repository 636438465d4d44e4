"""How long the steps of a vLLM engine last, measured where it schedules them.

Theory of operation. The KV connector's scheduler side is called twice for each step, first in the order
in which steps are scheduled and then in the order in which their results come:

    scheduled   the step's work is known and is about to be sent to the workers
    done        its tokens are here; the scheduler has taken them in

With asynchronous scheduling one step is sent while another one runs, so a step starts when it has been
sent and the one before is done. Where sequences of the step before run on, the engine was not idle in
between: what scheduling takes is then part of the step, as it is part of the gap between two tokens.
Accelerators need no events for this: results are copied to the host before they count as come.

Nothing waits within a step: pulls of KV run beside it, and a step without tokens, which only polls for
them, is left out. Steps with drafted tokens are left out too; step times know nothing of them.

Source of the hooks: vllm/v1/core/sched/scheduler.py (0.32), ``schedule`` and ``update_from_output``.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from core.observed_steps import StepObservation
from core.performance_model import PrefillChunk
from engine.pacing import MAX_GAP_S, StepWork
from engine.step_reader import StepReader

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_EVERY_S = 0.1
"""Between two measured steps of a kind: with prompts, without. What a step computes takes a while to read."""

Row = tuple[tuple[tuple[int, int, bool], ...], int, int, float]
"""A step as plain data: chunks (context, tokens, ends the prompt), sequences, their KV tokens, seconds."""


class StepMeter:
    """Measures a step of each kind now and then.

    Args:
        now_s: the clock.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._reader = StepReader()
        self._in_flight: deque[tuple[float, bool, StepWork | None]] = deque()
        """When each was sent, whether it goes on with the one before, what it computes if it is measured."""
        self._last_end_s = -math.inf
        self._due_s = [-math.inf, -math.inf]

    def scheduled(self, scheduler_output: SchedulerOutput) -> None:
        """A step is about to be sent."""
        now_s = self._now_s()
        work = None
        num_tokens = scheduler_output.total_num_scheduled_tokens
        has_prompts = num_tokens > len(scheduler_output.num_scheduled_tokens)
        if (
            num_tokens
            and now_s >= self._due_s[has_prompts]
            and not scheduler_output.scheduled_spec_decode_tokens
        ):
            self._due_s[has_prompts] = now_s + _EVERY_S
            work = self._reader.read(scheduler_output)
        else:
            self._reader.skip(scheduler_output)
        self._in_flight.append((now_s, bool(scheduler_output.scheduled_cached_reqs.req_ids), work))

    def done(self) -> Row | None:
        """The first step in flight has ended; what is known of it, if it was measured."""
        end_s, last_end_s = self._now_s(), self._last_end_s
        self._last_end_s = end_s
        sent_s, goes_on, work = self._in_flight.popleft()
        if work is None:
            return None
        runs_on = goes_on and sent_s - last_end_s <= MAX_GAP_S
        chunks = tuple((chunk.context_tokens, chunk.num_tokens, chunk.ends_prompt) for chunk in work.prefills)
        seconds = end_s - (last_end_s if runs_on else max(sent_s, last_end_s))
        return chunks, work.num_decoding, work.decode_kv_tokens, seconds


def observation(row: Sequence[Any]) -> StepObservation:
    """The step of a :data:`Row`, also after its tuples have become lists on the way."""
    chunks, num_decoding, decode_kv_tokens, seconds = row
    return StepObservation(
        prefills=tuple(
            PrefillChunk(context_tokens=context, num_tokens=num_tokens, ends_prompt=ends_prompt)
            for context, num_tokens, ends_prompt in chunks
        ),
        num_decoding=num_decoding,
        decode_kv_tokens=decode_kv_tokens,
        seconds=seconds,
    )
