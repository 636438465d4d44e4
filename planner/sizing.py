"""How many workers: the fewest GPUs that serve the load to come as well as all GPUs of the budget would.

More are asked for as soon as they are seen to be needed when they will have started. Fewer only when fewer
have been enough for as long as a worker takes to start: whoever gives a GPU back at once pays a whole start
for each swing of the load, whoever waits that long never pays more than twice what foresight would have paid.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.candidates import sized_splits
from planner.capacity import WorkerKind
from planner.demand import Demand, Forecast, Scenario
from planner.prediction import ClusterState, Predict
from planner.rate_forecast import RateForecast
from planner.settings import PlannedShape, PlannerSettings
from planner.split import PlannedSplit, ShapeSplit
from planner.traffic_history import MAX_GAP_S

LATE_FACTOR, LATE_S = 2.0, 60.0
"""Workers that have not come after this many start-up times and seconds are taken not to come..."""
GIVEN_UP_S = 300.0
"""...and are not asked for again for so long."""
MARGIN = 0.1
"""Fewer workers must be enough for a load this much greater..."""
DOUBT = 2.0
"""...and for the load as it may be, so many standard errors up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Workers wanted by shape, and why."""

    counts: Mapping[str, int]
    reason: str
    attainment: float
    """Predicted with so many."""


class Sizer:
    """Remembers how many workers were needed lately, and who did not come."""

    def __init__(self, settings: PlannerSettings, predict: Predict) -> None:
        self._settings = settings
        self._predict = predict
        self._needed: deque[tuple[float, Mapping[str, int]]] = deque()
        self._present: dict[str, int] = {}
        """At the last look."""
        self._missing_since_s: dict[str, float] = {}
        self._given_up_until_s: dict[str, float] = {}

    @property
    def startup_s(self) -> float:
        """Of the slowest shape to start whose count is free."""
        free = [shape for shape in self._settings.shapes if shape.min_workers < shape.max_workers]
        return max((shape.startup_s for shape in free), default=0.0)

    def size(
        self,
        now_s: float,
        kinds: Mapping[str, WorkerKind],
        wanted: Mapping[str, int],
        present: Mapping[str, int],
        demand: Demand | None,
        ahead: RateForecast | None,
        rate_error: float = 0.0,
        leaving: Mapping[str, int] | None = None,
    ) -> Sizing | None:
        """
        Args:
            kinds: of the shapes whose workers are known; others stay as they are.
            wanted: workers asked for by shape...
            present: ...and there.
            demand: the load of now; None: there is none.
            ahead: the rate when a worker asked for now will have started.
            rate_error: standard error of the demand's rate, as a share of it.
            leaving: workers that finish what they have, by shape: they hold their GPUs until then.

        Returns:
            None if nothing should change.
        """
        shapes = [self._bounded(now_s, shape, wanted, present) for shape in self._settings.shapes]
        if self._needed and not 0.0 <= now_s - self._needed[-1][0] <= MAX_GAP_S:
            self._needed.clear()  # nobody knows what was needed meanwhile
        if demand is None:
            needed, attainment = {shape.name: shape.min_workers for shape in shapes}, 1.0
        else:
            needed, attainment = self._fewest(shapes, kinds, wanted, demand, ahead)
        needed = enough = self._with_spares(shapes, needed)
        if demand is not None and any(num < wanted[name] for name, num in needed.items()):
            # Whoever is let go must not be missed a moment later, when the load looks a little greater.
            more = replace(demand, rate_rps=demand.rate_rps * (1.0 + MARGIN + DOUBT * rate_error))
            fewer, _ = self._fewest(shapes, kinds, wanted, more, ahead)
            enough = {name: max(num, needed[name]) for name, num in self._with_spares(shapes, fewer).items()}
        counts = {
            name: num if num >= wanted[name] else min(self._lately(now_s, name, enough[name]), wanted[name])
            for name, num in needed.items()
        }
        self._remember(now_s, enough)
        for shape in shapes:  # bounds hold at once
            counts[shape.name] = min(max(counts[shape.name], shape.min_workers), shape.max_workers)
        counts = self._within_budget(shapes, counts, wanted, leaving or {})
        changed = {name: num for name, num in counts.items() if num != wanted[name]}
        if not changed:
            return None
        reason = self._reason(changed, wanted, demand, ahead)
        return Sizing(counts=changed, reason=reason, attainment=attainment)

    def _fewest(
        self,
        shapes: Sequence[PlannedShape],
        kinds: Mapping[str, WorkerKind],
        wanted: Mapping[str, int],
        demand: Demand,
        ahead: RateForecast | None,
    ) -> tuple[dict[str, int], float]:
        """The fewest GPUs that attain the target share of what can be attained, and what they attain."""
        forecast = _at_its_highest(demand, ahead)
        known = [shape for shape in shapes if shape.name in kinds]
        fixed = {shape.name: wanted[shape.name] for shape in shapes if shape.name not in kinds}
        share = self._prefill_share(known, kinds, forecast)
        options = self._options(known, wanted)
        splits = [sized_splits(known, option, share) for option in options]
        flat = [split for of_option in splits for split in of_option]
        if not flat:
            return dict(wanted), 0.0
        predictions = iter(self._predict(kinds, flat, forecast, ClusterState()))
        attained = [max((next(predictions).attainment for _ in of), default=0.0) for of in splits]
        enough = self._settings.attainment_target * max(attained)
        gpus = {shape.name: shape.gpus_per_worker for shape in known}
        _, attainment, option = min(
            (sum(num * gpus[name] for name, num in option.items()), -attainment, index)
            for index, (option, attainment) in enumerate(zip(options, attained, strict=True))
            if attainment >= enough
        )
        return {**fixed, **options[option]}, -attainment

    def _prefill_share(
        self, shapes: Sequence[PlannedShape], kinds: Mapping[str, WorkerKind], forecast: Forecast
    ) -> float:
        one_each = PlannedSplit(tuple(ShapeSplit(shape.name, 1, 1) for shape in shapes))
        (prediction,) = self._predict(kinds, [one_each], forecast, ClusterState())
        return prediction.prefill_use / max(prediction.prefill_use + prediction.decode_use, 1e-9)

    def _options(self, shapes: Sequence[PlannedShape], wanted: Mapping[str, int]) -> list[dict[str, int]]:
        """Counts inside bounds and budget where one shape changes and the others stay."""
        base = {s.name: min(max(wanted[s.name], s.min_workers), s.max_workers) for s in shapes}
        options = [base]
        for shape in shapes:
            nums = range(shape.min_workers, shape.max_workers + 1)
            options += [{**base, shape.name: num} for num in nums if num != base[shape.name]]
        fitting = [option for option in options if self._fits(shapes, option)]
        return fitting or [base]

    def _fits(self, shapes: Sequence[PlannedShape], counts: Mapping[str, int]) -> bool:
        budget = self._settings.gpu_budget
        held = sum(counts[shape.name] * shape.gpus_per_worker for shape in shapes)
        return budget is None or held <= budget + 1e-9

    def _with_spares(self, shapes: Sequence[PlannedShape], needed: dict[str, int]) -> dict[str, int]:
        """Spares are of the smallest shape that may have more workers."""
        able = sorted(
            (shape for shape in shapes if shape.min_workers < shape.max_workers),
            key=lambda shape: shape.gpus_per_worker,
        )
        if not able:
            return needed
        shape = able[0]
        for _ in range(self._settings.num_spares):
            more = {**needed, shape.name: needed[shape.name] + 1}
            if more[shape.name] <= shape.max_workers and self._fits(shapes, more):
                needed = more
        return needed

    def _lately(self, now_s: float, name: str, needed: int) -> int:
        """The most that were needed within the hold time; before that is over, no fewer than there are."""
        hold_s = self._settings.hold_s
        if hold_s is None:
            hold_s = next(s.startup_s for s in self._settings.shapes if s.name == name)
        if not self._needed or self._needed[0][0] > now_s - hold_s:
            return 1 << 30
        recent = [counts[name] for at_s, counts in self._needed if at_s >= now_s - hold_s]
        return max([*recent, needed])

    def _remember(self, now_s: float, needed: Mapping[str, int]) -> None:
        self._needed.append((now_s, dict(needed)))
        longest_s = max(
            (shape.startup_s if self._settings.hold_s is None else self._settings.hold_s)
            for shape in self._settings.shapes
        )
        while len(self._needed) > 1 and self._needed[1][0] <= now_s - longest_s:
            self._needed.popleft()

    def _bounded(
        self, now_s: float, shape: PlannedShape, wanted: Mapping[str, int], present: Mapping[str, int]
    ) -> PlannedShape:
        """The shape; one whose workers do not come may have no more than are there, for a while."""
        name = shape.name
        came = present[name] > self._present.get(name, 0)
        self._present[name] = present[name]
        if present[name] >= wanted[name]:
            self._missing_since_s.pop(name, None)
        elif came:
            self._missing_since_s[name] = now_s  # they come; wait for the others as long
        else:
            since_s = self._missing_since_s.setdefault(name, now_s)
            if now_s - since_s > LATE_FACTOR * shape.startup_s + LATE_S:
                self._given_up_until_s[name] = now_s + GIVEN_UP_S
                del self._missing_since_s[name]
        if now_s >= self._given_up_until_s.get(name, now_s):
            return shape
        most = max(min(present[name], shape.max_workers), min(shape.min_workers, shape.max_workers))
        return replace(shape, max_workers=most)

    def _within_budget(
        self,
        shapes: Sequence[PlannedShape],
        counts: dict[str, int],
        wanted: Mapping[str, int],
        leaving: Mapping[str, int],
    ) -> dict[str, int]:
        """Shapes that grow wait until those that shrink, and workers that leave, have made room."""

        def held() -> dict[str, int]:
            return {name: max(num, wanted[name]) + leaving.get(name, 0) for name, num in counts.items()}

        for shape in shapes:
            while counts[shape.name] > max(shape.min_workers, wanted[shape.name]) and not self._fits(
                shapes, held()
            ):
                counts[shape.name] -= 1
        for shape in shapes:  # the budget may have been less when these were asked for
            while counts[shape.name] > shape.min_workers and not self._fits(shapes, counts):
                counts[shape.name] -= 1
        return counts

    def _reason(
        self,
        changed: Mapping[str, int],
        wanted: Mapping[str, int],
        demand: Demand | None,
        ahead: RateForecast | None,
    ) -> str:
        moves = ", ".join(f"{name} {wanted[name]} -> {num}" for name, num in changed.items())
        late = [name for name in changed if name in self._given_up_until_s and changed[name] < wanted[name]]
        if demand is None:
            return f"{moves}: no requests come"
        if late:
            return f"{moves}: no workers came"
        expected = f"{demand.rate_rps:.3g} requests/s"
        if ahead is not None:
            expected += f", {ahead.mean_rps:.3g} (up to {ahead.high_rps:.3g}) when workers have started"
        return f"{moves}: {expected}"


def _at_its_highest(demand: Demand, ahead: RateForecast | None) -> Forecast:
    """The most that is expected between now and when workers have started."""
    if ahead is None:
        return Forecast(demand=demand)
    rate_rps = max(demand.rate_rps, ahead.mean_rps)
    high = max(ahead.high_rps, rate_rps) / max(rate_rps, 1e-9)
    return Forecast(
        demand=replace(demand, rate_rps=rate_rps),
        scenarios=(
            Scenario(weight=0.5, prefill_factor=1.0, decode_factor=1.0),
            Scenario(weight=0.5, prefill_factor=high, decode_factor=high),
        ),
    )
