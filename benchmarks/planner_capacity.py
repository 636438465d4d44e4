"""What a cluster takes: the greatest rate at which some static split still serves the load well.

Well is ``GOOD_SHARE`` of the attainment that the same load has at a quarter of the rate: prompts that miss
the target alone, or for lack of a cache, are no matter of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.planner_loads import Mix, recorded, stationary
from benchmarks.planner_runs import Scene, run_static
from benchmarks.routing_runs import PROFILE, SLO
from simulator.planning.split import Split
from simulator.planning.split_estimate import SplitEstimator
from simulator.profiles.files import find_profile
from simulator.result import Slo
from simulator.traces.trace import Trace

GOOD_SHARE = 0.95
_NUM_HALVINGS = 5
_RANGE = (0.5, 1.4)
"""Times the estimate."""
_MOST_GPUS = 8
_MOST_GPUS_RECORDED = 4
"""Larger clusters are taken to have their share more; recorded traces take long."""
_STATIONARY_S = 75.0
_RECORDED_S = 120.0

MakeTrace = Callable[[float], Trace]
"""From a rate, requests per second."""


def mix_capacity_rps(mix: Mix, num_gpus: int, slo: Slo = SLO) -> float:
    """Of Poisson arrivals of one kind."""
    return capacity_rps(lambda rate: stationary(mix, rate, _STATIONARY_S, seed=11), num_gpus, slo)


def recorded_capacity_rps(name: str, num_gpus: int, duration_s: float | None = None) -> float:
    """Of a recorded trace, as the mean rate."""
    seconds = duration_s or _RECORDED_S
    size = min(num_gpus, _MOST_GPUS_RECORDED)
    return capacity_rps(lambda rate: recorded(name, rate, seconds, seed=11), size) * num_gpus / size


def capacity_rps(make_trace: MakeTrace, num_gpus: int, slo: Slo = SLO) -> float:
    """The greatest rate, to about three percent, found by halving the range."""
    size = min(num_gpus, _MOST_GPUS)
    trace = make_trace(float(size))
    uses = _uses(trace, size, slo)
    best = min(uses, key=lambda split: uses[split])
    estimate_rps = len(trace.requests) / trace.duration_s / uses[best]
    wanted = GOOD_SHARE * run_static(_scene(make_trace, estimate_rps / 4, size, slo), best).attainment
    low, high = (math.log(factor * estimate_rps) for factor in _RANGE)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        found = _first_good(_scene(make_trace, math.exp(middle), size, slo), best, wanted)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return math.exp(low) * num_gpus / size


def _first_good(scene: Scene, best: int, wanted: float) -> int | None:
    """Of the split and its neighbours, and no disaggregation, the first that serves the load well."""
    step = max(1, scene.num_gpus // 8)
    splits = dict.fromkeys((best, best + step, best - step, 0))
    for split in splits:
        if 0 <= split < scene.num_gpus and run_static(scene, split).attainment >= wanted:
            return split
    return None


def _scene(make_trace: MakeTrace, rate_rps: float, num_gpus: int, slo: Slo) -> Scene:
    return Scene(trace=make_trace(rate_rps), num_gpus=num_gpus, slo=slo)


def _uses(trace: Trace, num_gpus: int, slo: Slo) -> dict[int, float]:
    """Estimated utilisation of the busier side, by prefill workers."""
    profile = find_profile(PROFILE)
    estimator = SplitEstimator(trace, slo)
    uses = {}
    for num_prefill in range(1, num_gpus):
        split = Split(
            prefill_profile=profile,
            num_prefill=num_prefill,
            decode_profile=profile,
            num_decode=num_gpus - num_prefill,
        )
        estimate = estimator(split)
        uses[num_prefill] = max(estimate.prefill_utilisation, estimate.decode_utilisation)
    return uses
