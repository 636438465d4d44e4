"""How many requests will come, minutes ahead.

Exponential smoothing with a damped trend, on top of seasons where the past shows them (statsmodels' ETS and
STL).
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.traffic_history import MAX_GAP_S

Floats = npt.NDArray[np.float64]

BIN_S = 5.0
MAX_BINS = 2000
MIN_BINS = 12
"""With fewer, what is now is what will be."""
FITTED_BINS = 40
"""Without seasons, older bins are not looked at..."""
FITTED_PERIODS = 4
"""...and with them, older periods."""
REFIT_BINS = 2
"""A fit serves for so many bins."""
MAX_ITERATIONS = 12
MIN_PERIOD_BINS = 12
MIN_SEASONALITY = 0.6
"""Autocorrelation one period back from which a season is taken to be one."""
MIN_PERIODS = 2.0
_Z90 = 1.2816


@dataclass(frozen=True, slots=True, kw_only=True)
class RateForecast:
    """Requests per second at one time to come."""

    mean_rps: float
    high_rps: float
    """Exceeded once in ten times."""
    period_s: float | None = None
    """Of the season that was found."""


class RateForecaster:
    """Learns from counts of arrivals; fits once a bin."""

    def __init__(self) -> None:
        self._bins: deque[float] = deque(maxlen=MAX_BINS)
        """Arrivals in each full bin, oldest first."""
        self._bin_end_s: float | None = None
        self._filling = 0.0
        self._last_s = 0.0
        self._fit: _Fit | None = None
        self._num_new = 0
        """Bins since it was made."""
        _smooth(np.arange(MIN_BINS, dtype=float), None)  # loads the library: no decision waits seconds for it

    def observe(self, now_s: float, num_arrived: int, seconds: float) -> None:
        """Takes in the arrivals of the last ``seconds``. After a long silence it begins anew."""
        if self._bin_end_s is None or not 0.0 < now_s - self._last_s <= MAX_GAP_S:
            self._bins.clear()
            self._fit, self._filling, self._bin_end_s = None, 0.0, now_s - seconds + BIN_S
        self._last_s = now_s
        start_s, num_left = now_s - seconds, float(num_arrived)
        while now_s >= self._bin_end_s:  # what falls into a bin that ends is its share of the time
            share = (self._bin_end_s - start_s) / seconds if seconds > 0 else 1.0
            share = min(max(share, 0.0), 1.0)  # it may have ended before they began to be counted
            self._bins.append(self._filling + num_left * share)
            seconds, start_s = now_s - self._bin_end_s, self._bin_end_s
            num_left, self._filling = num_left * (1.0 - share), 0.0
            self._bin_end_s += BIN_S
            self._num_new += 1
        self._filling += num_left

    def forecast(self, horizon_s: float) -> RateForecast | None:
        """The rate ``horizon_s`` from now; None while too little is known."""
        if len(self._bins) < MIN_BINS:
            return None
        if self._fit is None or self._num_new >= REFIT_BINS:
            self._fit, self._num_new = _Fit(np.array(self._bins)), 0
        return self._fit.at(horizon_s + self._num_new * BIN_S)


class _Fit:
    def __init__(self, counts: Floats) -> None:
        self.period = season(counts)
        counts = counts[-(FITTED_BINS if self.period is None else FITTED_PERIODS * self.period) :]
        self._counts = counts
        self._results = _smooth(counts, self.period)
        self._known: dict[int, RateForecast] = {}

    def at(self, horizon_s: float) -> RateForecast:
        steps = max(1, math.ceil(horizon_s / BIN_S))
        if steps not in self._known:
            self._known[steps] = self._at(steps)
        return self._known[steps]

    def _at(self, steps: int) -> RateForecast:
        prediction = self._results.get_prediction(len(self._counts), len(self._counts) + steps - 1)
        mean = float(np.asarray(prediction.predicted_mean)[-1])
        # Even a known rate is known no better than Poisson arrivals in a bin let it be.
        error = math.sqrt(max(float(np.asarray(prediction.var_pred_mean)[-1]), mean, 0.0))
        period_s = None if self.period is None else self.period * BIN_S
        return RateForecast(
            mean_rps=max(mean, 0.0) / BIN_S,
            high_rps=max(mean + _Z90 * error, 0.0) / BIN_S,
            period_s=period_s,
        )


def season(counts: Sequence[float] | Floats) -> int | None:
    """The length in bins of the season that the counts show, if they do: where autocorrelation peaks."""
    from statsmodels.tsa.stattools import acf

    series = np.asarray(counts, dtype=float)
    most = int(len(series) / MIN_PERIODS)
    if most < MIN_PERIOD_BINS or series.std() == 0.0:
        return None
    correlation = acf(series, nlags=most, fft=True)
    below = np.flatnonzero(correlation < 0.0)
    if not len(below):
        return None
    first = max(int(below[0]), MIN_PERIOD_BINS)
    if first >= most:
        return None
    peak = first + int(np.argmax(correlation[first:]))
    # With few periods behind, the estimate is pulled towards 0 by the bins that have no partner.
    scaled = correlation[peak] * len(series) / (len(series) - peak)
    return peak if peak < most and scaled >= MIN_SEASONALITY else None


def _smooth(counts: Floats, period: int | None) -> Any:
    import pandas as pd
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel
    from statsmodels.tsa.forecasting.stl import STLForecast

    series = pd.Series(counts)  # an array has no labels for what lies ahead
    damped = {"error": "add", "trend": "add", "damped_trend": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that has not converged is a forecast all the same
        if period is not None:
            return STLForecast(series, ETSModel, model_kwargs=damped, period=period, robust=False).fit(
                fit_kwargs={"disp": False, "maxiter": MAX_ITERATIONS}
            )
        return ETSModel(series, **damped).fit(disp=False, maxiter=MAX_ITERATIONS)
