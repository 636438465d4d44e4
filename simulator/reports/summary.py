"""The figures of a simulation run: what ``baton simulate --json`` writes.

No wall-clock figure is among them, so that a seed gives the same file byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError
from simulator.reports.decisions import planner_figures
from simulator.result import Floats, Ints, Outcome, RequestTable, SimulationResult, Slo

MINUTE_S = 60.0
MIN_REQUESTS_IN_WORST_MINUTE = 10
"""A minute with fewer requests says too little to be called the worst."""
PERCENTILES = (50, 90, 95, 99)
_SIGNIFICANT_DIGITS = 6

Bools = npt.NDArray[np.bool_]


def summarize(result: SimulationResult, slo: Slo, *, settings: Mapping[str, object]) -> dict[str, Any]:
    """The run in figures, ready for :func:`to_json`.

    Attainment is the share of all offered requests; rejected and failed ones are misses. Latencies are
    those of the requests that were answered in full; ITL is over all gaps of ``result.gaps``. Percentiles
    are nearest-rank: each is a value that occurred. A figure without a value, such as a share of no
    requests, is None.

    Args:
        settings: what the run was made with (trace, seed, policy); passed through.

    Raises:
        core.errors.ConfigError: an SLO target is not a positive number.
        TypeError: a setting cannot be written as JSON.
    """
    requests = result.requests
    done = requests.outcome == Outcome.DONE
    ttft_met, tpot_met = slo_met(requests, slo)
    met = ttft_met & tpot_met
    num_requests = len(done)
    num_met = int(met.sum())
    prefilled = np.isfinite(requests.ttft_s)
    gpu_hours = result.gpu_seconds / 3600
    one_each = np.ones(num_requests, dtype=np.int64)

    summary = {
        "num_requests": num_requests,
        "num_done": int(done.sum()),
        "num_rejected": int((requests.outcome == Outcome.REJECTED).sum()),
        "num_failed": int((requests.outcome == Outcome.FAILED).sum()),
        "attainment": _ratio(num_met, num_requests),
        "attainment_ttft": _ratio(int(ttft_met.sum()), num_requests),
        "attainment_tpot": _ratio(int(tpot_met.sum()), num_requests),
        "goodput_rps": _ratio(num_met, result.simulated_s),
        "goodput_per_gpu_hour": _ratio(num_met, gpu_hours),
        "throughput_rps": _ratio(int(done.sum()), result.simulated_s),
        "output_tokens_per_s": _ratio(int(requests.output_tokens.sum()), result.simulated_s),
        "gpu_hours": float(gpu_hours),
        "ttft_ms": distribution_ms(requests.ttft_s, one_each * done),
        "tpot_ms": distribution_ms(requests.tpot_s, one_each * done),
        "itl_ms": distribution_ms(result.gaps.gap_s, result.gaps.weight),
        "e2e_ms": distribution_ms(requests.e2e_s, one_each * done),
        "cached_share": _ratio(
            int(requests.cached_tokens[prefilled].sum()), int(requests.prompt_tokens[prefilled].sum())
        ),
        "paths": _counts(requests.path),
        "role_switches": int(result.num_role_switches),
        "preemptions": int(result.num_preemptions),
        "recomputed": int(result.num_recomputed),
        "extrapolated_share": _ratio(result.extrapolated_share, 1.0),
        "worst_minute": worst_minute(requests.arrival_s, met),
        "slo": {"ttft_ms": slo.ttft_s * 1e3, "tpot_ms": slo.tpot_s * 1e3},
        "simulated_s": float(result.simulated_s),
        "settings": {str(key): _plain(value, f"settings.{key}") for key, value in settings.items()},
    }
    if result.decisions:
        summary["planner"] = planner_figures(result)
    return summary | _admission(requests, met)


def _admission(requests: RequestTable, met: Bools) -> dict[str, Any]:
    """What admission control did, where there was something for it to do."""
    figures: dict[str, Any] = {}
    if requests.refusal is not None:
        figures["refusals"] = _counts(requests.refusal)
    demands = requests.demands
    if demands is not None:
        for name, column in (("priority", demands.priority), ("tenant", demands.tenant)):
            if len(values := np.unique(column)) > 1:
                figures[f"by_{name}"] = {str(v): _of_some(requests, met, column == v) for v in values}
    return figures


def _of_some(requests: RequestTable, met: Bools, some: Bools) -> dict[str, Any]:
    """Figures of a part of the requests; ``attainment_done`` is of those answered in full."""
    done = some & (requests.outcome == Outcome.DONE)
    num_met = int((met & some).sum())
    return {
        "num_requests": int(some.sum()),
        "num_done": int(done.sum()),
        "attainment": _ratio(num_met, int(some.sum())),
        "attainment_done": _ratio(num_met, int(done.sum())),
        "ttft_ms": distribution_ms(requests.ttft_s, np.ones(len(done), dtype=np.int64) * done),
    }


def to_json(summary: Mapping[str, Any]) -> str:
    """The summary as JSON text with a newline at its end: floats with six significant digits, settings as
    they were given, None for what is not a finite number."""
    rounded = {
        key: _plain(value, key) if key == "settings" else _rounded(value) for key, value in summary.items()
    }
    return json.dumps(rounded, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def slo_met(requests: RequestTable, slo: Slo) -> tuple[Bools, Bools]:
    """Whether each request met the TTFT target, its own or else ``slo``'s, and whether it met TPOT's.

    Only requests answered in full meet any. An answer of one token has no TPOT and meets it.

    Raises:
        core.errors.ConfigError: an SLO target is not a positive number.
    """
    for name in ("ttft_s", "tpot_s"):
        if not 0 < getattr(slo, name) < math.inf:
            raise ConfigError(f"slo.{name} must be a positive number of seconds, not {getattr(slo, name)}")
    done = requests.outcome == Outcome.DONE
    ttft_s: Floats | float = slo.ttft_s
    tpot_s: Floats | float = slo.tpot_s
    if (demands := requests.demands) is not None:
        ttft_s = np.where(np.isnan(demands.ttft_slo_s), slo.ttft_s, demands.ttft_slo_s)
        tpot_s = np.where(np.isnan(demands.tpot_slo_s), slo.tpot_s, demands.tpot_slo_s)
    ttft_met = done & (requests.ttft_s <= ttft_s)
    tpot_met = done & ((requests.output_tokens <= 1) | (requests.tpot_s <= tpot_s))
    return ttft_met, tpot_met


def worst_minute(arrival_s: Floats, met: Bools) -> dict[str, Any] | None:
    """The minute whose arrivals met the SLO least often, the earliest of equals.

    Minutes start at 0, 60, 120 s... One counts if it is over by the last arrival and at least
    ``MIN_REQUESTS_IN_WORST_MINUTE`` requests arrived in it. None if no minute counts.
    """
    minute = (arrival_s // MINUTE_S).astype(np.int64)
    num_full = int(arrival_s[-1] // MINUTE_S) if len(arrival_s) else 0
    num_requests = np.bincount(minute, minlength=num_full)[:num_full]
    num_met = np.bincount(minute[met], minlength=num_full)[:num_full]
    candidates = np.flatnonzero(num_requests >= MIN_REQUESTS_IN_WORST_MINUTE)
    if not len(candidates):
        return None
    worst = candidates[np.argmin(num_met[candidates] / num_requests[candidates])]
    return {
        "start_s": float(worst * MINUTE_S),
        "attainment": float(num_met[worst] / num_requests[worst]),
        "num_requests": int(num_requests[worst]),
    }


def distribution_ms(seconds: Floats, weight: Ints) -> dict[str, float | None]:
    """Mean, nearest-rank percentiles and maximum in milliseconds; ``weight`` says how often each of
    ``seconds`` occurred. Values that are nan are left out."""
    present = np.isfinite(seconds) & (weight > 0)
    values_s = weighted_percentiles(seconds[present], weight[present], (*PERCENTILES, 100))
    names = [f"p{percent}" for percent in PERCENTILES] + ["max"]
    if values_s is None:
        return dict.fromkeys(["mean", *names])
    mean_s = float(np.average(seconds[present], weights=weight[present]))
    percentiles_ms = {name: value_s * 1e3 for name, value_s in zip(names, values_s, strict=True)}
    return {"mean": mean_s * 1e3, **percentiles_ms}


def weighted_percentiles(values: Floats, weight: Ints, percents: Sequence[int]) -> list[float] | None:
    """Nearest-rank percentiles of ``values``, each occurring ``weight`` (at least 1) times; None if there
    are none. Same as numpy's ``inverted_cdf`` without writing the repetitions out."""
    if not len(values):
        return None
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(weight[order])
    total = int(ends[-1])
    ranks = [max(1, -(-percent * total // 100)) for percent in percents]
    return [float(values[order[index]]) for index in np.searchsorted(ends, ranks)]


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole and math.isfinite(part / whole) else None


def _counts(labels: npt.NDArray[np.str_]) -> dict[str, int]:
    names, counts = np.unique(labels, return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts, strict=True) if name}


def _plain(value: object, key: str) -> Any:
    """``value`` in JSON's own types."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item, key) for item in value]
    raise TypeError(f"{key} is a {type(value).__name__}, which cannot be written as JSON")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
