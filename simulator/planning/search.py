"""Search among splits: climb from the best estimates, and find how many GPUs a target takes.

Nothing here simulates: splits are scored through a port. What is asked, and in which order, depends on
estimates and scores only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulator.planning.split import Line, Split
from simulator.planning.split_estimate import SplitEstimate

MAX_STARTS = 4
"""Kinds of workers the search starts from; those with worse estimates are left out."""
MIN_GAIN = 0.002
"""Attainment that twice the GPUs must add, or more GPUs are taken to be no help..."""
LIGHT_USE = 0.5
"""...unless workers are used more than this: under overload the first GPUs added may show no gain."""


_START_GPUS = 8
"""Where the search for a budget begins if no estimate reaches the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How a split did."""

    attainment: float
    goodput_rps: float
    ttft_p90_s: float
    """inf if no request was answered."""
    ttft_use: float
    """p99 TTFT as a multiple of its target; inf if no request was answered."""
    tpot_use: float
    """p99 TPOT as a multiple of its target."""

    @property
    def slo_use(self) -> float:
        """The worse of both."""
        return max(self.ttft_use, self.tpot_use)

    @property
    def rank(self) -> tuple[float, ...]:
        """Higher is better. Among splits that miss nothing, the one with the most headroom is best."""
        # Rounded, so that rounding errors of times do not decide.
        headroom = -round(self.slo_use, 4), -round(min(self.ttft_use, self.tpot_use), 4)
        if self.attainment >= 1:
            return self.attainment, *headroom, -self.ttft_p90_s
        return self.attainment, self.goodput_rps, -self.ttft_p90_s, *headroom


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What evaluating a split gives."""

    score: Score
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Further figures, passed through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A split that was evaluated."""

    split: Split
    why: str
    estimate: SplitEstimate
    evaluation: Evaluation

    @property
    def score(self) -> Score:
        return self.evaluation.score


Estimate = Callable[[Split], SplitEstimate]
EvaluateAll = Callable[[Sequence[Split]], Sequence[Evaluation]]
"""Scores splits, in the order given; it may work on them at the same time."""


class SplitSearch:
    """Climbs to good splits; whatever was evaluated once is known from then on.

    Args:
        lines: the candidates of a GPU budget, see :func:`simulator.planning.split.split_lines`.
        estimate: a cheap guess, for where to start.
        evaluate: the truth.
        max_starts: lines to start from.
    """

    def __init__(
        self,
        lines: Callable[[int], tuple[Line, ...]],
        estimate: Estimate,
        evaluate: EvaluateAll,
        *,
        max_starts: int = MAX_STARTS,
    ) -> None:
        self._lines = lines
        self._estimate = estimate
        self._evaluate = evaluate
        self._max_starts = max_starts
        self._known_lines: dict[int, tuple[Line, ...]] = {}
        self._estimates: dict[Split, SplitEstimate] = {}
        self._tried: dict[Split, Tried] = {}

    @property
    def tried(self) -> tuple[Tried, ...]:
        """Everything evaluated so far, in order."""
        return tuple(self._tried.values())

    def estimate(self, split: Split) -> SplitEstimate:
        """The guess, made once."""
        if split not in self._estimates:
            self._estimates[split] = self._estimate(split)
        return self._estimates[split]

    def starts(self, num_gpus: int) -> list[tuple[Line, Split]]:
        """The best estimate of each line, best first."""
        if num_gpus not in self._known_lines:
            self._known_lines[num_gpus] = self._lines(num_gpus)
        starts = [(line, max(line, key=self._guess)) for line in self._known_lines[num_gpus]]
        return sorted(starts, key=lambda start: self._guess(start[1]), reverse=True)

    def exhaust(self, num_gpus: int) -> Tried | None:
        """Evaluates every split of the budget; returns the best."""
        splits = [split for line in self._lines(num_gpus) for split in line]
        self._try([(split, "every split") for split in splits])
        return self._best(splits)

    def climb(self, num_gpus: int, enough: float | None = None) -> Tried | None:
        """Evaluates the best estimates and their neighbours until no neighbour is better.

        On a long line neighbours are first far apart; the step halves where it brings nothing.

        Args:
            num_gpus: the budget.
            enough: stop at the first split of this attainment.

        Returns:
            The best split found; None if the budget is too small for any.
        """
        starts = self.starts(num_gpus)[: self._max_starts]
        seen: list[Split] = []

        def look(splits: Sequence[tuple[Split, str]]) -> bool:
            self._try(splits)
            seen.extend(split for split, _ in splits)
            return enough is not None and any(
                self._tried[split].score.attainment >= enough for split, _ in splits
            )

        reasons = ["best estimate"] + ["best estimate of its kind of workers"] * len(starts)
        first = [(split, why) for (_, split), why in zip(starts, reasons, strict=False)]
        # Where one good split is enough, the likeliest goes first, alone.
        for batch in (first[:1], first[1:]) if enough is not None else (first,):
            if look(batch):
                return self._best(seen)
        for line, start in sorted(starts, key=lambda start: self._tried[start[1]].score.rank, reverse=True)[
            :2
        ]:
            step = max(1, len(line) // 16)
            here = line.index(start)
            while step:
                around = [place for place in (here - step, here + step) if 0 <= place < len(line)]
                if look([(line[place], _why(line[place], line[here])) for place in around]):
                    return self._best(seen)
                best = max([here, *around], key=lambda place: self._tried[line[place]].score.rank)
                if best == here:
                    step //= 2
                here = best
        return self._best(seen)

    def _guess(self, split: Split) -> tuple[float, ...]:
        return self.estimate(split).rank

    def _best(self, splits: Sequence[Split]) -> Tried | None:
        return max((self._tried[split] for split in splits), key=lambda tried: tried.score.rank, default=None)

    def _try(self, splits: Sequence[tuple[Split, str]]) -> None:
        new = [(split, why) for split, why in splits if split not in self._tried]
        if not new:
            return
        evaluations = self._evaluate([split for split, _ in new])
        for (split, why), evaluation in zip(new, evaluations, strict=True):
            self._tried[split] = Tried(
                split=split, why=why, estimate=self.estimate(split), evaluation=evaluation
            )


def _why(split: Split, base: Split) -> str:
    num_more = split.num_prefill - base.num_prefill
    workers = "worker" if abs(num_more) == 1 else "workers"
    return f"{abs(num_more)} prefill {workers} {'more' if num_more > 0 else 'fewer'} than {base.label}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpusNeeded:
    """The fewest GPUs for a target."""

    target: float
    """Attainment, 0 to 1."""
    num_gpus: int | None
    """None: not reached."""
    best: Tried | None
    """The best split of ``num_gpus``; if the target was not reached, the best one seen on the way."""
    reason: str = ""
    """Why the target was not reached."""


def gpus_needed(search: SplitSearch, target: float, *, low: int, max_gpus: int) -> GpusNeeded:
    """Gallops to a budget that reaches the target, then bisects: more GPUs are taken never to hurt.

    Args:
        search: scores budgets; what it knows already costs nothing.
        target: attainment, 0 to 1.
        low: the smallest budget worth trying: of a lower target's answer, or one worker.
        max_gpus: the largest.
    """
    best: Tried | None = None
    light = False

    def attains(num_gpus: int) -> float:
        nonlocal best, light
        found = search.climb(num_gpus, enough=target)
        if found is None:
            return 0.0
        if best is None or found.score.rank > best.score.rank:
            best = found
        light = max(found.estimate.prefill_utilisation, found.estimate.decode_utilisation) < LIGHT_USE
        return found.score.attainment

    def unreached(reason: str) -> GpusNeeded:
        return GpusNeeded(target=target, num_gpus=None, best=best, reason=reason)

    fails, reaches = low - 1, min(max_gpus, _guess(search, target, low, max_gpus))
    attainment = attains(reaches)
    if attainment >= target:
        step = 1
        while fails < (lower := reaches - step) and attains(lower) >= target:
            reaches, step = lower, 2 * step
        fails = max(fails, lower)
    while attainment < target:
        fails = reaches
        if fails >= max_gpus:
            return unreached(f"{max_gpus} GPUs, the limit, attain {100 * attainment:.2f} %")
        reaches = min(max_gpus, 2 * fails)
        before, attainment = attainment, attains(reaches)
        if attainment < target and light and attainment - before < MIN_GAIN:
            return unreached(
                f"more GPUs do not help: {fails} attain {100 * before:.2f} %, "
                f"{reaches} attain {100 * attainment:.2f} %"
            )
    while reaches - fails > 1:
        middle = (fails + reaches) // 2
        if attains(middle) >= target:
            reaches = middle
        else:
            fails = middle
    return GpusNeeded(target=target, num_gpus=reaches, best=search.climb(reaches))


def _guess(search: SplitSearch, target: float, low: int, max_gpus: int) -> int:
    """The smallest budget whose best estimate reaches the target, by galloping and bisection."""

    def enough(num_gpus: int) -> bool:
        starts = search.starts(num_gpus)
        return bool(starts) and search.estimate(starts[0][1]).attainment >= target

    fails, reaches = low - 1, low
    while not enough(reaches):
        if reaches >= max_gpus:
            return max(low, min(max_gpus, _START_GPUS))
        fails, reaches = reaches, min(max_gpus, 2 * reaches)
    while reaches - fails > 1:
        middle = (fails + reaches) // 2
        if enough(middle):
            reaches = middle
        else:
            fails = middle
    return reaches
