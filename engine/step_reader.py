"""What a vLLM step computes, read from its scheduler output.

Source: vllm/v1/core/sched/output.py (0.32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.performance_model import PrefillChunk
from engine.pacing import StepWork

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class StepReader:
    """What steps compute; shown every step, it remembers how long the prompts under way are."""

    def __init__(self) -> None:
        self._prompt_tokens: dict[str, int] = {}

    def skip(self, scheduler_output: SchedulerOutput) -> None:
        """Has the step pass by: cheap, whatever runs in it."""
        for request_id in scheduler_output.finished_req_ids:
            self._prompt_tokens.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            self._prompt_tokens[new.req_id] = len(new.prompt_token_ids or ())

    def read(self, scheduler_output: SchedulerOutput) -> StepWork | None:
        """None for a step without tokens."""
        self.skip(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            return None
        chunks = [
            (new.req_id, new.num_computed_tokens, self._prompt_tokens[new.req_id])
            for new in scheduler_output.scheduled_new_reqs
        ]
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, num_computed, num_output in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            num_tokens = self._prompt_tokens.get(request_id, num_computed) + num_output
            chunks.append((request_id, num_computed, num_tokens))
        return _work(chunks, scheduler_output.num_scheduled_tokens)


def _work(chunks: list[tuple[str, int, int]], num_scheduled: dict[str, int]) -> StepWork:
    """Of (request, tokens computed before, tokens it has); a chunk of one token counts as decoding."""
    prefills, num_decoding, decode_kv_tokens = [], 0, 0
    for request_id, num_computed, num_tokens in chunks:
        num_new = num_scheduled[request_id]
        if num_new == 1:
            num_decoding += 1
            decode_kv_tokens += num_computed
        else:
            prefills.append(
                PrefillChunk(
                    context_tokens=num_computed,
                    num_tokens=num_new,
                    ends_prompt=num_computed + num_new >= num_tokens,
                )
            )
    return StepWork(prefills=tuple(prefills), num_decoding=num_decoding, decode_kv_tokens=decode_kv_tokens)
