"""Traces that give rates per window of time: requests are drawn from them."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError
from simulator.traces.table import Table
from simulator.traces.trace import Trace, TraceRequest

_COLUMNS = ("t_s", "req_per_s", "mean_input_tokens", "mean_output_tokens")
_INPUT_SIGMA = 1.0
"""Standard deviation of the logarithm of prompt lengths."""
_LARGEST = 1e10

_log = logging.getLogger(__name__)


def is_windows(table: Table) -> bool:
    """Whether the file has ServeGen's columns."""
    return set(_COLUMNS) <= table.columns.keys()


def draw_windows(
    table: Table,
    *,
    name: str,
    seed: int,
    start_s: float = 0.0,
    duration_s: float | None = None,
    keep_share: float = 1.0,
    max_requests: int,
) -> Trace:
    """Draws the requests of a part of the file.

    Arrivals are Poisson within a window. Prompt lengths are lognormal with the window's mean and a
    sigma of 1.0; output lengths are geometric with its mean, as a constant chance to stop would give.
    A window lasts until the next one begins, and the last as long as the one before it.

    Args:
        table: ``t_s`` seconds, ``req_per_s``, ``mean_input_tokens``, ``mean_output_tokens``.
        name: of the trace.
        seed: of all draws.
        start_s: where to begin, seconds after the first window's start.
        duration_s: how much to draw; None: all.
        keep_share: rates are multiplied by it.
        max_requests: drawing ends where this many are expected, with a warning in the log.

    Raises:
        core.errors.ConfigError: a window makes no sense, or nothing is left to draw.
    """
    t_s, rate_rps, mean_input, mean_output = (_floats(table, column) for column in _COLUMNS)
    if len(t_s) < 2:
        raise ConfigError(f"{table.path}: one window alone does not say how long it lasts; give two or more")
    backwards = np.flatnonzero(np.diff(t_s) <= 0)
    if backwards.size:
        raise table.error(int(backwards[0]) + 1, "t_s must grow from row to row")
    edges_s = np.append(t_s, 2 * t_s[-1] - t_s[-2]) - t_s[0]
    end_s = edges_s[-1] if duration_s is None else min(edges_s[-1], start_s + duration_s)
    edges_s = np.clip(edges_s, start_s, max(end_s, start_s))
    expected = rate_rps * keep_share * np.diff(edges_s)
    total, before = float(expected.sum()), np.concatenate([[0.0], np.cumsum(expected)])
    if total > max_requests:
        end_s = float(np.interp(max_requests, before, edges_s))
        _log.warning(
            "%s: about %.0f requests in %.0f s; only the first %.0f s are drawn. Choose a part by start and "
            "duration, keep a share of the requests, or raise the limit of %d requests",
            table.path, total, edges_s[-1] - start_s, end_s - start_s, max_requests,
        )  # fmt: skip
        edges_s = np.minimum(edges_s, end_s)
        expected = rate_rps * keep_share * np.diff(edges_s)

    rng = np.random.default_rng(seed)
    counts = rng.poisson(expected)
    window = np.repeat(np.arange(len(counts)), counts)
    if not window.size:
        raise ConfigError(f"{table.path}: no request falls into the part chosen; choose a longer one")
    arrivals_s = np.sort(edges_s[window] + np.diff(edges_s)[window] * rng.random(len(window))) - start_s
    mu = np.log(np.maximum(mean_input, 1.0)) - _INPUT_SIGMA**2 / 2
    prompts = np.maximum(1, np.rint(rng.lognormal(mu[window], _INPUT_SIGMA)).astype(np.int64))
    outputs = rng.geometric(1 / np.maximum(mean_output, 1.0)[window])
    requests = tuple(
        TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        for arrival_s, prompt, output in zip(
            (arrivals_s - arrivals_s[0]).tolist(), prompts.tolist(), outputs.tolist(), strict=True
        )
    )
    return Trace(name=name, requests=requests)


def _floats(table: Table, column: str) -> npt.NDArray[np.float64]:
    values = np.empty(len(table.lines))
    for row, cell in enumerate(table.columns[column]):
        try:
            values[row] = float(cell)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            values[row] = np.nan
        if not 0 <= values[row] <= _LARGEST:
            raise table.error(row, f"{column} is {cell!r}; give a number from 0 to {_LARGEST:g}")
    return values
