"""Which split to move to: the one that serves most from here, its price paid, if that is worth a move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.decision import Alternative
from planner.moves import Moves, cheapest_moves
from planner.observation import ObservedWorker
from planner.prediction import HORIZON_S, Prediction
from planner.split import PlannedSplit

MIN_GAIN = 0.02
"""Share of the requests that a move must gain over the horizon..."""
CLEAR_GAIN = 0.15
"""...and that makes one look enough; less is confirmed by a second look."""
ENOUGH_OF_GAIN = 0.9
"""Share of the best split's gain for which one that is nearer is taken: the load may turn back."""
LASTING_GAIN = 0.005
"""A gain between this and ``MIN_GAIN`` is worth a move once it has lasted..."""
LASTING_LOOKS = 20
"""...for so many looks that all wanted more of the same role."""
_NUM_ALTERNATIVES = 8


@dataclass(frozen=True, slots=True)
class Option:
    """A split, what it promises and what it costs."""

    split: PlannedSplit
    prediction: Prediction
    moves: Moves
    net_requests: float
    """Requests in time over the horizon, less those that the moves cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to do about the roles."""

    present: Option
    chosen: Option
    """``present`` if nothing changes."""
    reason: str
    ranked: tuple[Option, ...]
    """The best few, and the present one."""

    def alternatives(self, gpus_per_worker: Mapping[str, float]) -> tuple[Alternative, ...]:
        """For the record."""
        return tuple(
            Alternative(
                split=option.split.label,
                num_gpus=option.split.num_gpus(gpus_per_worker),
                attainment=option.prediction.attainment,
                score=option.net_requests / HORIZON_S,
            )
            for option in self.ranked
        )


class RoleChooser:
    """Remembers what the last look leaned to."""

    def __init__(self) -> None:
        self._leaning: PlannedSplit | None = None
        """What the last look would have moved to, had it been clearer."""
        self._wanted: PlannedSplit | None = None
        """What the last look would have gained a little by, or more..."""
        self._num_wanted = 0
        """...and how many looks in a row wanted more of the same role."""

    def forget(self) -> None:
        """Looks that come are not confirmed by those that were."""
        self._leaning = None
        self._num_wanted = 0

    def choose(
        self,
        workers: Sequence[ObservedWorker],
        splits: Sequence[PlannedSplit],
        soon: Sequence[Prediction],
        later: Sequence[Prediction],
        rate_rps: float,
    ) -> Choice:
        """
        A split must be better both soon and later: one that is better only until batches have filled would
        be left again, one that is better only once they have can wait.

        Args:
            splits: to choose from, the present one first.
            soon: predictions up to the horizon, one a split...
            later: ...and in the long run.
        """
        requests = rate_rps * HORIZON_S
        options = []
        for split, prediction, in_the_end in zip(splits, soon, later, strict=True):
            moves = cheapest_moves(workers, split)
            gain = min(
                prediction.attainment - soon[0].attainment, in_the_end.attainment - later[0].attainment
            )
            net_requests = (soon[0].attainment + gain) * requests - moves.cost_requests
            if not math.isfinite(net_requests):
                net_requests = -math.inf
            options.append(Option(split, prediction, moves, net_requests))
        present = options[0]
        ranked = sorted(options, key=lambda option: option.net_requests, reverse=True)
        best = _fewest_moves(ranked, present)
        gain = (best.net_requests - present.net_requests) / max(requests, 1e-9)
        chosen, reason = self._judge(present, best, gain)
        shown = ranked[:_NUM_ALTERNATIVES]
        if present not in shown:
            shown.append(present)
        return Choice(present=present, chosen=chosen, reason=reason, ranked=tuple(shown))

    def _judge(self, present: Option, best: Option, gain: float) -> tuple[Option, str]:
        leaning, self._leaning = self._leaning, None
        self._count(present, best, gain)
        if best is present:
            return present, "the split is the best there is"
        if not math.isfinite(gain):
            return present, "what the split does now cannot be predicted"
        text = f"{best.split.label} would gain {gain:.1%} of the requests"
        if gain < MIN_GAIN and self._num_wanted >= LASTING_LOOKS:
            self._num_wanted = 0
            return best, f"{text}, and has done so for {LASTING_LOOKS} looks"
        if gain < MIN_GAIN:
            return present, f"{text}, less than a move is worth"
        if gain < CLEAR_GAIN and not _same_direction(leaning, best.split, present.split):
            self._leaning = best.split
            return present, f"{text}, if the next look agrees"
        self._num_wanted = 0
        return best, text

    def _count(self, present: Option, best: Option, gain: float) -> None:
        """How long a small gain has lasted."""
        if best is present or not gain >= LASTING_GAIN:
            self._num_wanted = 0
            return
        same = _same_direction(self._wanted, best.split, present.split)
        self._num_wanted = self._num_wanted + 1 if same else 1
        self._wanted = best.split


def _fewest_moves(ranked: Sequence[Option], present: Option) -> Option:
    """Of the splits that gain most of what the best one gains, the one nearest to the present."""
    most = ranked[0].net_requests - present.net_requests
    if not most > 0.0:
        return present
    if not math.isfinite(most):
        return ranked[0]
    enough = present.net_requests + ENOUGH_OF_GAIN * most
    good = [option for option in ranked if option.net_requests >= enough]
    return min(good, key=lambda option: len(option.moves.changes))


def _same_direction(leaning: PlannedSplit | None, best: PlannedSplit, present: PlannedSplit) -> bool:
    """Whether two looks want more of the same role."""
    if leaning is None:
        return False
    return (leaning.num_prefill - present.num_prefill) * (best.num_prefill - present.num_prefill) > 0
