"""How many requests will come: steady loads, trends, seasons, and clocks that jump."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from planner.rate_forecast import BIN_S, MIN_BINS, RateForecaster, season

PERIOD_S = 300.0


def fed(rates: list[float], seed: int = 0, start_s: float = 0.0) -> RateForecaster:
    """A forecaster that has seen a second of each rate."""
    forecaster, rng = RateForecaster(), np.random.default_rng(seed)
    for number, rate in enumerate(rates):
        forecaster.observe(start_s + number + 1.0, int(rng.poisson(rate)), 1.0)
    return forecaster


def wave(now_s: float) -> float:
    return 25.0 + 20.0 * math.sin(2 * math.pi * now_s / PERIOD_S)


@pytest.mark.parametrize("seed", range(3))
def test_a_steady_load_goes_on(seed: int) -> None:
    found = fed([20.0] * 300, seed).forecast(60.0)
    assert found is not None
    assert found.mean_rps == pytest.approx(20.0, rel=0.15)
    assert found.mean_rps < found.high_rps < 32.0
    assert found.period_s is None


def test_a_step_is_followed() -> None:
    found = fed([10.0] * 200 + [30.0] * 60).forecast(40.0)
    assert found is not None
    assert found.mean_rps == pytest.approx(30.0, rel=0.35)


def test_a_rise_is_foreseen() -> None:
    rates = [25.0] * 100 + [25.0 + second for second in range(100)]  # 125 now, 155 then
    ahead = [found.mean_rps for seed in range(3) if (found := fed(rates, seed).forecast(30.0)) is not None]
    assert min(ahead) > 125.0
    assert np.mean(ahead) == pytest.approx(155.0, rel=0.15)


def test_after_two_periods_a_wave_is_forecast_a_minute_ahead() -> None:
    forecaster, rng = RateForecaster(), np.random.default_rng(0)
    errors = []
    for second in range(1, int(3 * PERIOD_S)):
        forecaster.observe(float(second), int(rng.poisson(wave(second))), 1.0)
        if second > 2.3 * PERIOD_S and second % 20 == 0:
            found = forecaster.forecast(60.0)
            assert found is not None
            assert found.period_s == pytest.approx(PERIOD_S, rel=0.1)
            errors.append(found.mean_rps - wave(second + 60.0))
    assert np.mean(np.abs(errors)) < 0.2 * 25.0


def test_noise_has_no_season() -> None:
    rng = np.random.default_rng(0)
    assert [season(rng.poisson(50, 300)) for _ in range(20)] == [None] * 20
    assert season([7.0] * 300) is None
    assert season([]) is None


def test_little_is_no_forecast() -> None:
    assert RateForecaster().forecast(60.0) is None
    assert fed([5.0] * int((MIN_BINS - 1) * BIN_S)).forecast(60.0) is None
    found = fed([0.0] * 200).forecast(60.0)
    assert found is not None
    assert found.mean_rps == pytest.approx(0.0, abs=0.01)


def test_looks_of_any_length_count_the_same() -> None:
    whole, parts = RateForecaster(), RateForecaster()
    for number in range(60):
        parts.observe(2.5 * (number + 1), 25, 2.5)
    for number in range(20):
        whole.observe(7.5 * (number + 1), 75, 7.5)
    figures = [each.forecast(10.0) for each in (whole, parts)]
    assert [figure.mean_rps for figure in figures if figure] == [pytest.approx(10.0, rel=0.02)] * 2


@pytest.mark.parametrize("jump_s", [-1e6, -3.0, 2.0, 31.0, 1e6, math.nan])
def test_a_clock_that_jumps_makes_no_requests_and_takes_none(jump_s: float) -> None:
    forecaster = fed([20.0] * 200)
    start_s = 200.0 + jump_s
    forecaster.observe(start_s, 20, 1.0)
    start_s = start_s if math.isfinite(start_s) else 500.0
    for second in range(1, 201):
        forecaster.observe(start_s + second, 20, 1.0)
    found = forecaster.forecast(30.0)
    assert found is not None
    assert found.mean_rps == pytest.approx(20.0, rel=0.15)
    assert math.isfinite(found.high_rps)


def test_what_a_fit_takes_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for name, rates in (("steady", [20.0] * 600), ("season", [wave(second) for second in range(900)])):
        forecaster = fed(rates)
        forecaster.forecast(60.0)  # imports count once
        forecaster.observe(len(rates) + 10.0, 200, 10.0)
        began_s = time.process_time()
        assert forecaster.forecast(60.0) is not None
        with capsys.disabled():
            print(f"\nforecast, {name}: {1e3 * (time.process_time() - began_s):.0f} ms of CPU")
