"""What came and went between two looks at the routers' counts, kept for a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.traffic import NUM_ANSWER_CLASSES, NUM_PROMPT_CLASSES, TrafficSummary
from planner.observation import ObservedRouter
from planner.plausible import ANSWER_ROWS, PROMPT_ROWS, answer_rows, plausible_growth, prompt_rows

Ints = npt.NDArray[np.int64]

KEPT_S = 600.0
MAX_GAP_S = 30.0
"""After a longer time without a look nobody knows when things happened: the history begins anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficSample:
    """Traffic of all routers between two looks; see :class:`core.traffic.TrafficSummary`."""

    end_s: float
    seconds: float
    prompts: Ints
    """Rows arrived, prompt tokens, placed tokens, cached tokens; columns by class of prompt."""
    answers: Ints
    """Rows reached, ended, ended tokens; columns by class of answer."""
    output_tokens: int = 0
    kv_tokens: int = 0
    """In front of the output tokens, summed."""

    @property
    def num_arrived(self) -> int:
        return int(self.prompts[0].sum())


class TrafficHistory:
    """The last minutes, a sample a look."""

    def __init__(self) -> None:
        self.samples: deque[TrafficSample] = deque()
        """Oldest first."""
        self._last: dict[str, TrafficSummary] = {}
        self._looked_at_s: float | None = None

    def observe(self, now_s: float, routers: Sequence[ObservedRouter]) -> None:
        """Adds what happened since the last look.

        What a router had counted when it was first seen, or before its counts fell, is left out. A time of
        which no router tells is no time without requests.
        """
        prompts = np.zeros((len(PROMPT_ROWS), NUM_PROMPT_CLASSES), dtype=np.int64)
        answers = np.zeros((len(ANSWER_ROWS), NUM_ANSWER_CLASSES), dtype=np.int64)
        output_tokens = kv_tokens = 0
        seen, is_known = {}, False
        for router in routers:
            summary = router.traffic
            seen[summary.router_id] = summary
            if (last := self._last.get(summary.router_id)) is None:
                continue
            more_prompts = prompt_rows(summary) - prompt_rows(last)
            more_answers = answer_rows(summary) - answer_rows(last)
            if plausible_growth(more_prompts, more_answers):
                is_known = True
                prompts += more_prompts
                answers += more_answers
                output_tokens += max(summary.output_tokens - last.output_tokens, 0)
                kv_tokens += max(summary.kv_tokens - last.kv_tokens, 0)
        if not seen and self._last:
            return  # the next look that hears of them takes what came over the longer time
        self._last = seen
        before_s, self._looked_at_s = self._looked_at_s, now_s
        if before_s is None or not 0.0 < now_s - before_s <= MAX_GAP_S:
            self.samples.clear()
            return
        if not is_known:
            return
        self.samples.append(
            TrafficSample(
                end_s=now_s,
                seconds=now_s - before_s,
                prompts=prompts,
                answers=answers,
                output_tokens=output_tokens,
                kv_tokens=kv_tokens,
            )
        )
        while self.samples[0].end_s < now_s - KEPT_S:
            self.samples.popleft()
