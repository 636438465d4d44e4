"""Arrival times of a recorded trace: units, datetimes, and timestamps too coarse to take at their word."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError
from simulator.traces.table import Cell, Table

Floats = npt.NDArray[np.float64]

_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
"""Decimal places between a unit and the second."""
_DATETIME = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:[.,](\d+))?\s*(Z|UTC|[+-]\d\d:?\d\d)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SLOWEST_GAP_S = 20.0
"""Whole numbers with a wider mean gap are taken for milliseconds: recorded services are busier."""
_FASTEST_RPS = 2000.0
"""Above it the log asks whether the unit is right."""
_FINEST_STEP_S = 1e-6
_WIDEST_STEP_S = 60.0

_log = logging.getLogger(__name__)


def read_times(table: Table, column: str, unit: str | None, *, exact: bool = False) -> Floats:
    """A column as seconds after its earliest, row by row; as they are where ``exact``.

    Args:
        table: the file.
        column: where the times are.
        unit: ``s``, ``ms``, ``us``, ``ns`` or ``datetime``; None: text that is no number is a datetime,
            huge numbers count from 1970, fractions are seconds, and whole numbers are seconds unless
            that makes a request every 20 s or fewer. Datetimes without a zone are UTC.
        exact: the times already count from the start of the trace.

    Raises:
        core.errors.ConfigError: a cell is no time.
    """
    cells = table.columns[column]
    if unit == "datetime" or _is_datetime(cells[0]):
        ticks, digits = [_datetime_ns(table, row, column, cell) for row, cell in enumerate(cells)], 9
        return _since_first(ticks, 10**digits)
    values = [_decimal_text(table, row, column, cell) for row, cell in enumerate(cells)]
    guessed = unit is None
    unit = unit or _guess_unit(table, column, values)
    digits = _DIGITS[unit]
    if all(isinstance(value, int) for value in values):
        ticks = [int(value) for value in values]
        times_s = (
            np.array([tick / 10**digits for tick in ticks]) if exact else _since_first(ticks, 10**digits)
        )
    else:
        # Moving the point in the text is exact; dividing by a power of ten would round a second time.
        times_s = np.array([_shifted(value, digits) for value in values])
        times_s = times_s if exact else times_s - times_s.min()
    span_s = float(times_s.max() - times_s.min())
    if not guessed and not exact and len(values) > _FASTEST_RPS * span_s > 0:
        _log.warning(
            "%s: %s in %s makes %.0f requests/s; if that is wrong, give the unit, as in arrival_s=%s:s",
            table.path, column, unit, len(values) / span_s, column,
        )  # fmt: skip
    return times_s


def _since_first(ticks: list[int], ticks_per_s: int) -> Floats:
    """Subtracts before it divides, so that counts from 1970 keep their digits."""
    first = min(ticks)
    return np.array([(tick - first) / ticks_per_s for tick in ticks])


def _is_datetime(cell: Cell) -> bool:
    return isinstance(cell, str) and _DATETIME.fullmatch(cell.strip().replace("/", "-")) is not None


def _datetime_ns(table: Table, row: int, column: str, cell: Cell) -> int:
    match = _DATETIME.fullmatch(cell.strip().replace("/", "-")) if isinstance(cell, str) else None
    try:
        if match is None:
            raise ValueError("no match")
        day, clock, fraction, zone = match.groups()
        zone = "+00:00" if zone in (None, "Z", "UTC") else zone
        delta = datetime.fromisoformat(f"{day}T{clock}{zone}") - _EPOCH
    except ValueError as error:
        raise table.error(
            row, f"{column} is {cell!r}; give a datetime such as 2024-05-10 00:00:00.009930+00:00"
        ) from error
    return (delta.days * 86400 + delta.seconds) * 10**9 + int((fraction or "0")[:9].ljust(9, "0"))


def _decimal_text(table: Table, row: int, column: str, cell: Cell) -> int | str:
    """A number, whole or as its text."""
    number = cell
    if isinstance(cell, str):
        text = cell.strip()
        try:
            number = int(text) if text.removeprefix("-").isdecimal() else _checked(text)
        except ValueError:
            number = None
    if isinstance(number, str) or (type(number) is int and abs(number) < 2**63):
        return number
    raise table.error(row, f"{column} is {cell!r}; give a time, as a number or a datetime in every row")


def _checked(text: str) -> str:
    if not abs(float(text)) < 2**63:
        raise ValueError(text)
    return text


def _shifted(value: int | str, digits: int) -> float:
    if isinstance(value, int):
        ticks_per_s: int = 10**digits
        return value / ticks_per_s
    if "e" in value or "E" in value:
        return float(value) / 10.0**digits
    return float(f"{value}e-{digits}")


def _guess_unit(table: Table, column: str, values: list[int | str]) -> str:
    numbers = np.array([float(value) for value in values])
    low, high = float(numbers.min()), float(numbers.max())
    if low > 1e8:  # times since 1970 in some unit, or the clock of a machine that never stops
        return next(
            unit for unit, least in (("ns", 1e17), ("us", 1e14), ("ms", 1e11), ("s", 0)) if low > least
        )
    if not np.all(numbers == np.floor(numbers)):
        return "s"
    unit = "ms" if high - low > _SLOWEST_GAP_S * (len(values) - 1) else "s"
    _log.warning(
        "%s: %s read as %s; if that is wrong, give the unit, as in arrival_s=%s:ms",
        table.path, column, "milliseconds" if unit == "ms" else "seconds", column,
    )  # fmt: skip
    return unit


def coarse_step_s(times_s: Floats) -> float:
    """The step of timestamps that only tell in which step a request came; 0 where they tell more.

    Coarse means: at least half of the requests share their timestamp with another one, and nearly all
    gaps between timestamps are multiples of one step. A little jitter is allowed: Mooncake's steps of
    3 s have a few milliseconds of it.

    Args:
        times_s: sorted.
    """
    stamps_s, counts = np.unique(times_s, return_counts=True)
    if len(stamps_s) < 3 or counts[counts > 1].sum() * 2 < len(times_s):
        return 0.0
    gaps_s = np.diff(stamps_s)
    step_s = float(np.quantile(gaps_s, 0.05, method="lower"))
    if step_s < _FINEST_STEP_S:
        return 0.0
    step_s = float(gaps_s.sum() / np.maximum(np.rint(gaps_s / step_s), 1).sum())
    off = np.abs(gaps_s / step_s - np.maximum(np.rint(gaps_s / step_s), 1))
    regular = np.mean(off <= 0.05) >= 0.95
    return step_s if regular and step_s <= _WIDEST_STEP_S else 0.0


def spread(times_s: Floats, step_s: float, rng: np.random.Generator) -> Floats:
    """Moves each request to a uniform place between its timestamp and the step's end, order kept.

    Args:
        times_s: sorted.
        step_s: length of a step; a step ends early where the next timestamp comes early.
        rng: draws one number a request.
    """
    stamps_s, group = np.unique(times_s, return_inverse=True)
    widths_s = np.minimum(np.append(np.diff(stamps_s), step_s), step_s)
    return np.sort(times_s + widths_s[group] * rng.random(len(times_s)))


def check_step(step_s: float) -> None:
    """Refuses a step that is no length of time."""
    if not 0 <= step_s < float("inf"):
        raise ConfigError(f"the step of coarse timestamps must be 0 (leave them) or seconds, not {step_s}")
