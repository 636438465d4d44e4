"""The best static split of a GPU budget for a trace, and the GPUs that given attainments take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from core.errors import ConfigError
from core.performance_profile import PerformanceProfile
from router.policy import LeastLoadPolicy
from simulator.planning.busiest_window import busiest_window
from simulator.planning.search import Evaluation, GpusNeeded, SplitSearch, Tried, gpus_needed
from simulator.planning.slo_ceiling import Ceiling, slo_ceiling
from simulator.planning.split import Split, gpus_of, split_lines
from simulator.planning.split_estimate import OVERHEAD_S, SplitEstimate, SplitEstimator
from simulator.planning.split_runs import SplitRuns, evaluator
from simulator.result import Slo
from simulator.simulation import MakePolicy
from simulator.traces.edits import window
from simulator.traces.trace import Trace

TARGETS = (0.90, 0.95, 0.99)
_MAX_GPUS_FACTOR = 16
_OPTIMISTIC_OVERHEAD_S = OVERHEAD_S / 2
"""Below what any request pays for router and network, so that the ceiling is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticPlan:
    """What was found, and how."""

    trace_name: str
    num_requests: int
    """Of the trace, or of its busiest window if one was chosen."""
    window_s: tuple[float, float] | None
    """Start and end of the busiest window in the trace; None: the whole trace was planned on."""
    slo: Slo
    num_gpus: int
    best: Tried
    tried: tuple[Tried, ...]
    """Every simulated split of any budget, in order."""
    candidates: tuple[tuple[Split, SplitEstimate], ...]
    """All splits of the budget, best estimate first."""
    exhaustive: bool
    ceiling: Ceiling
    needed: tuple[GpusNeeded, ...]
    """By target."""
    max_gpus: int

    @property
    def num_candidates(self) -> int:
        return len(self.candidates)

    @property
    def num_simulated(self) -> int:
        """How many of the candidates were simulated."""
        of_budget = {split for split, _ in self.candidates}
        return sum(tried.split in of_budget for tried in self.tried)

    def to_dict(self) -> dict[str, Any]:
        """Ready for ``simulator.reports.summary.to_json``: six significant digits, None for inf."""
        figures = {
            "trace": self.trace_name,
            "num_requests": self.num_requests,
            "window_s": list(self.window_s) if self.window_s else None,
            "slo": {"ttft_ms": self.slo.ttft_s * 1e3, "tpot_ms": self.slo.tpot_s * 1e3},
            "num_gpus": self.num_gpus,
            "best": _tried_dict(self.best) | {"summary": dict(self.best.evaluation.summary)},
            "search": {
                "exhaustive": self.exhaustive,
                "num_candidates": self.num_candidates,
                "num_simulated": self.num_simulated,
                "num_simulated_all_budgets": len(self.tried),
                "tried": [_tried_dict(tried) for tried in self.tried],
                "candidates": [
                    _split_dict(split) | {"estimate": asdict(estimate)} for split, estimate in self.candidates
                ],
            },
            "ceiling": asdict(self.ceiling) | {"reason": self.ceiling.reason},
            "gpus_needed": [
                {
                    "target": needed.target,
                    "num_gpus": needed.num_gpus,
                    "best": _tried_dict(needed.best) if needed.best else None,
                    "reason": needed.reason,
                }
                for needed in self.needed
            ],
            "max_gpus": self.max_gpus,
        }
        return {key: _plain(value) for key, value in figures.items()}


def plan_static(
    trace: Trace,
    slo: Slo,
    num_gpus: int,
    prefill_profiles: Sequence[PerformanceProfile],
    decode_profiles: Sequence[PerformanceProfile] | None = None,
    *,
    targets: Sequence[float] = TARGETS,
    max_gpus: int | None = None,
    busiest_minutes: float | None = None,
    exhaustive: bool = False,
    jobs: int | None = None,
    seed: int = 0,
    make_policy: MakePolicy = LeastLoadPolicy,
    on_progress: Callable[[str], None] = lambda line: None,
) -> StaticPlan:
    """Plans by simulation, with estimates to save most of the simulations.

    Args:
        trace: what will come.
        slo: targets of a request.
        num_gpus: the budget.
        prefill_profiles: kinds of prefill workers to choose from, such as TP sizes.
        decode_profiles: kinds of decode workers; None: the same.
        targets: attainments to find the fewest GPUs for, 0 to 1; empty: none.
        max_gpus: most GPUs to look at for them; None: 16 times the budget.
        busiest_minutes: plan on the stretch of this length with the most work. It starts with empty
            caches and no queue. None: on the whole trace.
        exhaustive: simulate every split of the budget; GPUs for targets are searched all the same.
        jobs: simulations at a time; None: one a core. The plan does not depend on it.
        make_policy: the routing policy; it goes to other processes.
        on_progress: told a line for each simulation done.

    Raises:
        core.errors.ConfigError: the budget holds no split, or an argument is wrong.
    """
    if decode_profiles is None:
        decode_profiles = prefill_profiles
    prefill_profiles = tuple(dict.fromkeys(prefill_profiles))
    decode_profiles = tuple(dict.fromkeys(decode_profiles))
    lines = split_lines(prefill_profiles, decode_profiles, num_gpus)
    if max_gpus is None:
        max_gpus = _MAX_GPUS_FACTOR * num_gpus
    _check(trace, slo, num_gpus, targets, max_gpus, jobs)
    low = _fewest_gpus(prefill_profiles, decode_profiles)
    if not lines:
        raise ConfigError(f"{num_gpus} GPUs hold no split, the smallest takes {low}: give more GPUs")
    window_s = None
    if busiest_minutes is not None:
        window_s = busiest_window(trace, busiest_minutes, prefill_profiles[0], decode_profiles[0])
        trace = window(trace, *window_s)

    estimator = SplitEstimator(trace, slo)
    ceiling = slo_ceiling(trace, slo, prefill_profiles, decode_profiles, overhead_s=_OPTIMISTIC_OVERHEAD_S)
    num_done = 0

    def on_done(split: Split, evaluation: Evaluation) -> None:
        nonlocal num_done
        num_done += 1
        on_progress(
            f"simulation {num_done}: {split.label} on {split.num_gpus} GPUs attains "
            f"{100 * evaluation.score.attainment:.2f} %"
        )

    runs = SplitRuns(trace=trace, slo=slo, seed=seed, make_policy=make_policy)
    with evaluator(runs, jobs, on_done) as evaluate:
        search = SplitSearch(
            lambda budget: split_lines(prefill_profiles, decode_profiles, budget), estimator, evaluate
        )
        best = search.exhaust(num_gpus) if exhaustive else search.climb(num_gpus)
        assert best is not None
        needed = _needed(search, ceiling, targets, low, max_gpus)
    candidates = [(split, search.estimate(split)) for line in lines for split in line]
    return StaticPlan(
        trace_name=trace.name,
        num_requests=len(trace.requests),
        window_s=window_s,
        slo=slo,
        num_gpus=num_gpus,
        best=best,
        tried=search.tried,
        candidates=tuple(sorted(candidates, key=lambda candidate: candidate[1].rank, reverse=True)),
        exhaustive=exhaustive,
        ceiling=ceiling,
        needed=needed,
        max_gpus=max_gpus,
    )


def _needed(
    search: SplitSearch, ceiling: Ceiling, targets: Sequence[float], low: int, max_gpus: int
) -> tuple[GpusNeeded, ...]:
    """A higher target takes no fewer GPUs, and is beyond reach if a lower one is."""
    needed: list[GpusNeeded] = []
    for target in sorted(set(targets)):
        if ceiling.attainment < target:
            needed.append(GpusNeeded(target=target, num_gpus=None, best=None, reason=ceiling.reason))
        elif needed and needed[-1].num_gpus is None:
            last = needed[-1]
            needed.append(GpusNeeded(target=target, num_gpus=None, best=last.best, reason=last.reason))
        else:
            found = gpus_needed(search, target, low=low, max_gpus=max_gpus)
            if found.num_gpus is None and ceiling.attainment_uncached < target:
                most = f"{100 * ceiling.attainment_uncached:.2f} %"
                found = replace(found, reason=f"{found.reason}; where nothing is cached, {most} is the most")
            needed.append(found)
            low = found.num_gpus or low
    return tuple(needed)


def _fewest_gpus(
    prefill_profiles: Sequence[PerformanceProfile], decode_profiles: Sequence[PerformanceProfile]
) -> int:
    most = max(map(gpus_of, prefill_profiles)) + max(map(gpus_of, decode_profiles))
    return next(n for n in range(1, most + 1) if split_lines(prefill_profiles, decode_profiles, n))


def _check(
    trace: Trace, slo: Slo, num_gpus: int, targets: Sequence[float], max_gpus: int, jobs: int | None
) -> None:
    if not trace.requests:
        raise ConfigError(f"trace {trace.name!r} has no request: there is nothing to plan for")
    for name in ("ttft_s", "tpot_s"):
        if not 0 < getattr(slo, name) < math.inf:
            raise ConfigError(f"slo.{name} must be a positive number of seconds, not {getattr(slo, name)}")
    for target in targets:
        if not 0 < target <= 1:
            raise ConfigError(f"a target is an attainment above 0 and at most 1, such as 0.95, not {target}")
    if num_gpus < 1:
        raise ConfigError(f"num_gpus must be at least 1, not {num_gpus}")
    if max_gpus < num_gpus:
        raise ConfigError(f"max_gpus ({max_gpus}) must be at least num_gpus ({num_gpus})")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, not {jobs}")


def _split_dict(split: Split) -> dict[str, Any]:
    return {
        "split": split.label,
        "prefill_profile": split.prefill_profile.name,
        "num_prefill": split.num_prefill,
        "decode_profile": split.decode_profile.name,
        "num_decode": split.num_decode,
        "num_gpus": split.num_gpus,
    }


def _tried_dict(tried: Tried) -> dict[str, Any]:
    return _split_dict(tried.split) | {
        "why": tried.why,
        "score": asdict(tried.score),
        "estimate": asdict(tried.estimate),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
