"""The oracle: the best piecewise-constant schedule of splits that is found knowing the trace.

What each static split achieves in each window of time gives a first guess by dynamic programming. Every score
is a whole simulation, with the delays and drains that a switch has. The search then tries other
prices, earlier and later changes, the other rule of who switches, the planner's own schedule, and small edits
of the best. Its result is the best of all that was simulated, static splits and the planner among it: a lower
bound of what perfect knowledge could do, and the same for every seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.planner_runs import WINDOW_S, Run, Scene, run_schedule, run_static
from benchmarks.planner_schedule import Change, Rule, Schedule, tidy

ALL_SPLITS_UP_TO = 8
"""GPUs; with more, splits are searched from coarse to fine."""
_COARSE_PARTS, _FINE_PARTS = 8, 16
_HOPELESS = 0.9
"""A split that attains less than this part of the best, and less than the one before it, ends that way."""
_PRICES_S = (1.0, 4.0, 15.0)
"""Of one move in the first guess: seconds of one GPU's share of the load."""
_LEADS_S = (3.0, 8.0, -4.0)
"""By which all changes come earlier."""
_SHIFTS_S = (-10.0, -5.0, -2.0, 2.0, 5.0, 10.0)
_SHORTEST_S = 2.0
_ROLE_SWITCH_S = 0.1
"""As in :class:`simulator.spec.ClusterSpec`."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Oracle:
    """The best that was found."""

    run: Run
    found_by: str
    num_simulations: int
    """All that its score is the greatest of: static splits and planner included."""


def static_runs(scene: Scene) -> dict[int, Run]:
    """By prefill workers: every split of up to ``ALL_SPLITS_UP_TO`` GPUs, 0 (no disaggregation) among them.

    Of more: 0, half of the GPUs, and from there either way in eighths until one serves hopelessly few; then
    the neighbours of the best so far, in halves of that step down to a sixteenth. From 1 on attainment has
    one peak in the number of prefill workers, but for noise: too few are as bad as too many.
    """
    size = scene.num_gpus
    if size <= ALL_SPLITS_UP_TO:
        return {num_prefill: run_static(scene, num_prefill) for num_prefill in range(size)}
    step, middle = size // _COARSE_PARTS, size // 2
    runs = {num_prefill: run_static(scene, num_prefill) for num_prefill in (0, middle)}

    def best() -> int:
        return max((split for split in runs if split), key=lambda split: runs[split].num_met)

    for way in (-step, step):
        last = middle
        while 0 < last + way < size:
            runs[last + way] = run_static(scene, last + way)
            hopeless = runs[last + way].num_met < _HOPELESS * runs[best()].num_met
            if hopeless and runs[last + way].num_met < runs[last].num_met:
                break
            last += way
    while (step := step // 2) >= max(1, size // _FINE_PARTS):
        peak = best()
        for near in (peak - step, peak + step):
            if 0 < near < size and near not in runs:
                runs[near] = run_static(scene, near)
    return dict(sorted(runs.items()))


def search(scene: Scene, statics: dict[int, Run], planner: Run | None, budget: int, seed: int = 0) -> Oracle:
    """
    Args:
        statics: of this scene, by prefill workers.
        planner: of this scene.
        budget: how many schedules to simulate.
    """
    return _Search(scene, statics, planner, budget, seed).run()


class _Search:
    def __init__(
        self, scene: Scene, statics: dict[int, Run], planner: Run | None, budget: int, seed: int
    ) -> None:
        self._scene = scene
        self._statics = statics
        self._planner = planner
        self._budget = budget
        self._rng = np.random.default_rng(seed)
        self._values = window_values(statics, scene.num_gpus)
        self._done: dict[tuple[Schedule, Rule], Run] = {}
        best = max(statics, key=lambda num_prefill: statics[num_prefill].num_met)
        self._best_run = statics[best]
        self._best: tuple[Schedule, Rule] = (tidy([Change(start_s=0, num_prefill=best)]), Rule.LEAST_WORK)
        self._found_by = "static split"

    def run(self) -> Oracle:
        if self._planner is not None:
            own = schedule_of(self._planner)
            if self._planner.num_met > self._best_run.num_met:
                self._best, self._best_run, self._found_by = (own, Rule.LEAST_WORK), self._planner, "planner"
            self._try(own, Rule.LEAST_WORK, "planner's schedule")
        for price_s in _PRICES_S:
            self._try(self._guess(price_s), Rule.LEAST_WORK, "windows")
        for lead_s in _LEADS_S:
            self._try(earlier(self._best[0], lead_s), Rule.LEAST_WORK, "windows")
        self._try(self._best[0], Rule.FIXED, "other rule")
        # A short schedule may have no more edits to offer, so there is an end to asking.
        for _ in range(20 * self._budget):
            if len(self._done) >= self._budget:
                break
            self._try(self._edited(), self._best[1], "edits")
        return Oracle(
            run=replace(self._best_run, name="oracle"),
            found_by=self._found_by,
            num_simulations=len(self._done) + len(self._statics) + (self._planner is not None),
        )

    def _try(self, schedule: Schedule, rule: Rule, found_by: str) -> None:
        if len(schedule) < 2 or (schedule, rule) in self._done or len(self._done) >= self._budget:
            return
        run = self._done[schedule, rule] = run_schedule(self._scene, schedule, rule)
        if run.num_met > self._best_run.num_met:
            self._best, self._best_run, self._found_by = (schedule, rule), run, found_by

    def _guess(self, price_s: float) -> Schedule:
        requests = self._best_run.num_requests
        per_gpu_rps = requests / self._scene.trace.duration_s / self._scene.num_gpus
        splits = best_path(self._values, price_s * per_gpu_rps)
        return tidy(
            [Change(start_s=number * WINDOW_S, num_prefill=split) for number, split in enumerate(splits)]
        )

    def _edited(self) -> Schedule:
        """The best schedule with one thing changed, drawn at random."""
        changes = list(self._best[0])
        kind = self._rng.choice(("repair", "shift", "level", "drop"), p=(0.4, 0.3, 0.2, 0.1))
        place = int(self._rng.integers(len(changes)))
        change = changes[place]
        if kind == "repair":
            return self._repaired()
        if kind == "shift" and place:
            changes[place] = replace(change, start_s=change.start_s + float(self._rng.choice(_SHIFTS_S)))
        elif kind == "drop" and place:
            del changes[place]
        else:
            step = int(self._rng.choice((-1, 1))) * max(1, self._scene.num_gpus // 32)
            wanted = min(max(change.num_prefill + step, 0), self._scene.num_gpus - 1)
            changes[place] = replace(change, num_prefill=wanted)
        return tidy(changes)

    def _repaired(self) -> Schedule:
        """A window that some static split does better in, the worse the likelier, gets that split."""
        num_windows = self._values.shape[0]
        met = np.zeros(num_windows)
        met[: len(self._best_run.met_by_window)] = self._best_run.met_by_window
        lost = np.maximum(self._values.max(axis=1) - met, 0.0) + 1e-9
        first = last = int(self._rng.choice(num_windows, p=lost / lost.sum()))
        split = int(self._values[first].argmax())
        while last + 1 < num_windows and self._rng.random() < 0.5:
            last += 1
        lead_s = float(self._rng.choice((0.0, 3.0, 8.0)))
        start_s, end_s = max(0.0, first * WINDOW_S - lead_s), (last + 1) * WINDOW_S - lead_s
        old = self._best[0]
        after = [change for change in old if change.start_s <= end_s][-1].num_prefill
        kept = [change for change in old if not start_s <= change.start_s <= end_s]
        ends = [Change(start_s=end_s, num_prefill=after)] if last + 1 < num_windows else []
        return tidy([*kept, Change(start_s=start_s, num_prefill=split), *ends])


def window_values(statics: dict[int, Run], num_gpus: int) -> Floats:
    """(windows, splits) requests within both targets; what was not simulated lies between its neighbours."""
    known = sorted(statics)
    rows = np.array([statics[num_prefill].met_by_window for num_prefill in known], dtype=np.float64)
    splits = np.arange(num_gpus)
    return np.array([np.interp(splits, known, column) for column in rows.T])


def best_path(values: Floats, price: float) -> list[int]:
    """The split of each window: the greatest sum, less ``price`` for each worker that changes its role."""
    num_splits = values.shape[1]
    moved = price * np.abs(np.arange(num_splits)[:, None] - np.arange(num_splits))
    total, back = values[0], []
    for row in values[1:]:
        paths = total - moved  # (to, from)
        back.append(paths.argmax(axis=1))
        total = paths.max(axis=1) + row
    path = [int(total.argmax())]
    for came_from in reversed(back):
        path.append(int(came_from[path[-1]]))
    return path[::-1]


def schedule_of(run: Run) -> Schedule:
    """What a run did, as a schedule: workers take a role a little after they are told to."""
    steps: Sequence[Change] = [
        Change(start_s=step.time_s - _ROLE_SWITCH_S if step.time_s else 0.0, num_prefill=step.num_prefill)
        for step in run.steps
    ]
    return tidy(list(_lasting(steps)))


def earlier(schedule: Schedule, lead_s: float) -> Schedule:
    """The same changes, sooner."""
    first, *others = schedule
    return tidy([first, *(replace(change, start_s=change.start_s - lead_s) for change in others)])


def _lasting(steps: Sequence[Change]) -> Iterator[Change]:
    """Several switches in a row are one change."""
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if following is None or following.start_s - step.start_s >= _SHORTEST_S or not step.start_s:
            yield step
