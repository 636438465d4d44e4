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

MIN_GAIN = 0.005
"""Share of the requests that a look must promise by a move to speak for it at all."""
ENOUGH_REGRET = 0.1
"""What looks in a row that want more of the same role have promised together, until a move is made..."""
CLEAR_GAIN = 0.15
"""...by two looks or more, unless one alone promises this much."""
ENOUGH_OF_GAIN = 0.9
"""Share of the best split's gain for which one that is nearer is taken: the load may turn back."""
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
    """Remembers what has been missed by staying.

    A move is made once what it would have gained so far, had it been made before, comes to what a move must
    be worth (the ski rental rule). What gains little has to last; what passes is sat out.
    """

    def __init__(self) -> None:
        self._wanted: PlannedSplit | None = None
        """What the last look would have gained by..."""
        self._regret = 0.0
        """...and what all looks in a row that wanted more of the same role have promised together."""

    def forget(self) -> None:
        """Looks that come are not confirmed by those that were."""
        self._wanted = None

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
        shown += [option for option in dict.fromkeys((chosen, present)) if option not in shown]
        return Choice(present=present, chosen=chosen, reason=reason, ranked=tuple(shown))

    def _judge(self, present: Option, best: Option, gain: float) -> tuple[Option, str]:
        wanted, self._wanted = self._wanted, None
        if best is present:
            return present, "the split is the best there is"
        if not math.isfinite(gain):
            return present, "what the split does now cannot be predicted"
        text = f"{best.split.label} would gain {gain:.1%} of the requests"
        if gain < MIN_GAIN:
            return present, f"{text}, less than a move is worth"
        is_confirmed = _same_direction(wanted, best.split, present.split)
        self._regret = (self._regret if is_confirmed else 0.0) + gain
        if gain >= CLEAR_GAIN or (is_confirmed and self._regret >= ENOUGH_REGRET):
            return best, text
        self._wanted = best.split
        return present, f"{text}, if that lasts"


def _fewest_moves(ranked: Sequence[Option], present: Option) -> Option:
    """Of the splits that gain most of what the best one gains, the one nearest to the present."""
    most = ranked[0].net_requests - present.net_requests
    if not most > 0.0:
        return present
    enough = present.net_requests + ENOUGH_OF_GAIN * most
    good = [option for option in ranked if option is ranked[0] or option.net_requests >= enough]
    return min(good, key=lambda option: len(option.moves.changes))


def _same_direction(leaning: PlannedSplit | None, best: PlannedSplit, present: PlannedSplit) -> bool:
    """Whether two looks want more of the same role."""
    if leaning is None:
        return False
    return (leaning.num_prefill - present.num_prefill) * (best.num_prefill - present.num_prefill) > 0
