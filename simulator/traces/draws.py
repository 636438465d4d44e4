"""What generated loads are made of: distributions of lengths, and processes of arrivals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MAX_TOKENS = 100_000_000
_MAX_REQUESTS = 20_000_000
_Z99 = 2.3263478740408408
"""The 99th percentile of the standard normal distribution."""


def check(holds: bool, name: str, value: float, rule: str) -> None:
    """Raises ConfigError unless ``holds``; false for nan as well, if asked as a comparison."""
    if not holds:
        raise ConfigError(f"{name} must be {rule}, not {value:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedLengths:
    """Always the same."""

    tokens: int

    def __post_init__(self) -> None:
        check(1 <= self.tokens <= _MAX_TOKENS, "the length", self.tokens, "at least 1 token")

    def draw(self, rng: np.random.Generator, num: int) -> Ints:
        """(num,) tokens."""
        return np.full(num, self.tokens, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformLengths:
    """Every whole number from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        check(self.low >= 1, "the lowest length", self.low, "at least 1 token")
        check(
            self.low <= self.high <= _MAX_TOKENS, "the highest length", self.high, "no less than the lowest"
        )

    def draw(self, rng: np.random.Generator, num: int) -> Ints:
        """(num,) tokens."""
        return rng.integers(self.low, self.high, size=num, endpoint=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalLengths:
    """Many short, few very long; at least 1 token. One of ``p99`` and ``sigma`` gives the spread."""

    mean: float
    p99: float | None = None
    """The length that one in a hundred exceeds."""
    sigma: float | None = None
    """Standard deviation of the logarithm."""

    def __post_init__(self) -> None:
        check(1 <= self.mean <= _MAX_TOKENS, "the mean length", self.mean, "at least 1 token")
        if (self.p99 is None) == (self.sigma is None):
            raise ConfigError("lognormal lengths need either p99 or sigma")
        if self.sigma is not None:
            check(0 <= self.sigma <= 5, "sigma", self.sigma, "between 0 and 5")
        if self.p99 is not None:
            highest = self.mean * math.exp(_Z99**2 / 2)
            check(
                self.mean <= self.p99 <= highest,
                "p99",
                self.p99,
                f"from the mean to {highest:.0f}, 14.9 means",
            )

    @property
    def log_sigma(self) -> float:
        """``sigma``, or the one that gives ``p99``: p99 / mean = exp(z sigma - sigma^2 / 2)."""
        if self.p99 is None:
            assert self.sigma is not None
            return self.sigma
        return _Z99 - math.sqrt(max(0.0, _Z99**2 - 2 * math.log(self.p99 / self.mean)))

    def draw(self, rng: np.random.Generator, num: int) -> Ints:
        """(num,) tokens."""
        sigma = self.log_sigma
        lengths = rng.lognormal(math.log(self.mean) - sigma**2 / 2, sigma, size=num)
        return np.clip(np.rint(lengths), 1, _MAX_TOKENS).astype(np.int64)


Lengths = FixedLengths | UniformLengths | LognormalLengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent arrivals at one rate."""

    rate_rps: float

    def __post_init__(self) -> None:
        check(0 < self.rate_rps < math.inf, "rate", self.rate_rps, "above 0 requests/s")

    def draw(self, rng: np.random.Generator, duration_s: float) -> Floats:
        """Sorted times from 0 to before ``duration_s``."""
        expected = checked_num(self.rate_rps * duration_s)
        return np.sort(rng.random(rng.poisson(expected)) * duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """Gamma-distributed gaps: the same mean rate, in clusters."""

    rate_rps: float
    cv: float
    """Coefficient of variation of the gaps; 1 is Poisson, more is burstier."""

    def __post_init__(self) -> None:
        check(0 < self.rate_rps < math.inf, "rate", self.rate_rps, "above 0 requests/s")
        check(0.01 <= self.cv <= 100, "cv", self.cv, "between 0.01 and 100")

    def draw(self, rng: np.random.Generator, duration_s: float) -> Floats:
        """Sorted times from 0 to before ``duration_s``."""
        shape = 1 / self.cv**2
        num = int(checked_num(self.rate_rps * duration_s) * 1.1) + 100
        times_s = np.empty(0)
        while not times_s.size or times_s[-1] < duration_s:
            gaps_s = rng.gamma(shape, 1 / (shape * self.rate_rps), size=num)
            times_s = np.append(times_s, (times_s[-1] if times_s.size else 0.0) + np.cumsum(gaps_s))
            checked_num(len(times_s))
        return times_s[times_s < duration_s]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinusoid:
    """A rate that swings between low and high, low first; independent arrivals by thinning."""

    low_rps: float
    high_rps: float
    period_s: float

    def __post_init__(self) -> None:
        check(0 <= self.low_rps < math.inf, "low", self.low_rps, "at least 0 requests/s")
        check(0 < self.high_rps < math.inf, "high", self.high_rps, "above 0 requests/s")
        check(self.low_rps <= self.high_rps, "low", self.low_rps, f"at most high ({self.high_rps:g})")
        check(0 < self.period_s < math.inf, "period", self.period_s, "above 0 s")

    def rate_rps(self, time_s: Floats) -> Floats:
        """The rate at each time."""
        swing = (1 - np.cos(2 * math.pi * time_s / self.period_s)) / 2
        return self.low_rps + (self.high_rps - self.low_rps) * swing

    def draw(self, rng: np.random.Generator, duration_s: float) -> Floats:
        """Sorted times from 0 to before ``duration_s``."""
        times_s = Poisson(rate_rps=self.high_rps).draw(rng, duration_s)
        return times_s[rng.random(len(times_s)) * self.high_rps < self.rate_rps(times_s)]


Arrivals = Poisson | Bursts | Sinusoid


def checked_num(expected: float) -> float:
    """Refuses a load too large to hold in memory."""
    if expected > _MAX_REQUESTS:
        raise ConfigError(
            f"this load has about {expected:.3g} requests and at most {_MAX_REQUESTS:,} can be made; lower "
            f"the rate or the duration"
        )
    return expected
