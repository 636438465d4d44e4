"""What came and went between two looks at the routers' counts, kept for a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.traffic import NUM_ANSWER_CLASSES, NUM_PROMPT_CLASSES, TrafficSummary
from planner.observation import ObservedRouter

Ints = npt.NDArray[np.int64]

KEPT_S = 600.0
MAX_GAP_S = 30.0
"""After a longer time without a look nobody knows when things happened: the history begins anew."""
_COLUMNS = ("num_arrived", "prompt_tokens", "placed_tokens", "cached_tokens")
_ANSWER_COLUMNS = ("num_reached", "num_ended", "ended_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficSample:
    """Traffic of all routers between two looks; see :class:`core.traffic.TrafficSummary`."""

    end_s: float
    seconds: float
    prompts: Ints
    """Rows arrived, prompt tokens, placed tokens, cached tokens; columns by class of prompt."""
    answers: Ints
    """Rows reached, ended, ended tokens; columns by class of answer."""

    @property
    def num_arrived(self) -> int:
        return int(self.prompts[0].sum())


class TrafficHistory:
    """The last minutes, a sample a look."""

    def __init__(self) -> None:
        self.samples: deque[TrafficSample] = deque()
        """Oldest first, without gaps."""
        self._last: dict[str, TrafficSummary] = {}
        self._looked_at_s: float | None = None

    def observe(self, now_s: float, routers: Sequence[ObservedRouter]) -> None:
        """Adds what happened since the last look.

        What a router had counted when it was first seen, or before its counts fell, is left out.
        """
        prompts = np.zeros((len(_COLUMNS), NUM_PROMPT_CLASSES), dtype=np.int64)
        answers = np.zeros((len(_ANSWER_COLUMNS), NUM_ANSWER_CLASSES), dtype=np.int64)
        seen = {}
        for router in routers:
            summary = router.traffic
            seen[summary.router_id] = summary
            if (last := self._last.get(summary.router_id)) is None:
                continue
            more_prompts = _rows(summary, _COLUMNS) - _rows(last, _COLUMNS)
            more_answers = _rows(summary, _ANSWER_COLUMNS) - _rows(last, _ANSWER_COLUMNS)
            if (more_prompts >= 0).all() and (more_answers >= 0).all():
                prompts += more_prompts
                answers += more_answers
        self._last = seen
        before_s, self._looked_at_s = self._looked_at_s, now_s
        if before_s is None or not 0.0 < now_s - before_s <= MAX_GAP_S:
            self.samples.clear()
            return
        self.samples.append(
            TrafficSample(end_s=now_s, seconds=now_s - before_s, prompts=prompts, answers=answers)
        )
        while self.samples[0].end_s < now_s - KEPT_S:
            self.samples.popleft()


def _rows(summary: TrafficSummary, names: Sequence[str]) -> Ints:
    return np.array([getattr(summary, name) for name in names], dtype=np.int64)
