"""What the planner has decided lately, for those who ask."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planner.decision import PlanDecision, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class PastDecision:
    """A decision and what came of it."""

    at_s: float
    """Wall-clock time, seconds since 1970."""
    decision: PlanDecision
    cpu_s: float
    """What it took to decide."""
    carried_out: bool
    """Whether what it changes was asked for; never in mode advise."""
    failures: tuple[str, ...] = ()
    """What could not be asked for."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a number that is not finite is None."""
        plain: dict[str, Any] = _finite(
            {
                **asdict(self.decision),
                "at_s": self.at_s,
                "cpu_s": self.cpu_s,
                "carried_out": self.carried_out,
                "failures": list(self.failures),
            }
        )
        return plain


class History:
    """The last decisions, and of those that change something as many again: holding is frequent.

    Args:
        capacity: how many of each are kept.
    """

    def __init__(self, capacity: int = 1000) -> None:
        self._all: deque[PastDecision] = deque(maxlen=capacity)
        self._moves: deque[PastDecision] = deque(maxlen=capacity)

    def add(self, past: PastDecision) -> None:
        """Takes the newest."""
        self._all.append(past)
        if past.decision.verdict is Verdict.MOVE:
            self._moves.append(past)

    def last(self, num: int, *, moves: bool = False) -> Sequence[PastDecision]:
        """The last ``num`` in order, only those with verdict ``move`` if so wanted."""
        kept = self._moves if moves else self._all
        return list(kept)[max(0, len(kept) - num) :]

    def numbered(self, number: int) -> PastDecision | None:
        """The decision with this number, None if it is not kept (any more)."""
        return next((past for past in (*self._all, *self._moves) if past.decision.number == number), None)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
