"""Reads recorded traces: Mooncake, Azure, ServeGen, and any CSV or JSONL with named columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from core.errors import ConfigError
from simulator.traces.columns import find_columns, token_counts
from simulator.traces.edits import thin, window
from simulator.traces.hashes import read_hashes
from simulator.traces.table import Table, read_table
from simulator.traces.times import check_step, coarse_step_s, read_times, spread
from simulator.traces.trace import Trace, TraceRequest
from simulator.traces.windows import draw_windows, is_windows

EXACT = "exact_arrivals"
"""A key of the first line: arrival times are exact and count from the start of the trace."""
MAX_DRAWN_REQUESTS = 300_000

_log = logging.getLogger(__name__)


def read_trace(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    start_s: float = 0.0,
    duration_s: float | None = None,
    keep_share: float = 1.0,
    spread_step_s: float | None = None,
    max_drawn_requests: int = MAX_DRAWN_REQUESTS,
) -> Trace:
    """Reads a trace file, gzipped or not. Requests come out sorted, the first one at 0.

    A file of ``write_trace`` comes back as it was written, its first request where it was.

    Formats, told by the content:
        Mooncake JSONL: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``.
        Azure CSV: ``TIMESTAMP`` (a datetime), ``ContextTokens``, ``GeneratedTokens``.
        ServeGen windows CSV: ``t_s``, ``req_per_s``, ``mean_input_tokens``, ``mean_output_tokens``.
            Requests are drawn, see ``windows``.
        any other CSV or JSONL: common names are guessed, ``columns`` names the rest.

    Rows without tokens to read or to write (0, empty or null) are requests that failed where they were
    recorded. They are dropped, with their count in the log. Where many requests share a timestamp and
    timestamps grow by a fixed step, requests are spread uniformly over the step they came in.

    Args:
        path: the file.
        columns: field -> column, for the fields ``arrival_s``, ``prompt_tokens``, ``output_tokens``,
            ``block_hashes`` and ``hash_block_tokens`` (a column or a number). A unit may follow the
            column of ``arrival_s``: ``ts:ms``, also s, us, ns, datetime.
        seed: of everything that is drawn.
        start_s: requests that come earlier are left out.
        duration_s: how much to read from ``start_s`` on; None: all.
        keep_share: each request is kept with this chance; time stays as it is.
        spread_step_s: the step of coarse timestamps; None: found by itself, 0: none.
        max_drawn_requests: most requests to draw from windows of rates; where they describe more, the
            trace ends early, with a warning in the log.

    Raises:
        core.errors.ConfigError: the file, a row of it or an argument is wrong.
    """
    _check_arguments(start_s, duration_s, keep_share, max_drawn_requests)
    if spread_step_s is not None:
        check_step(spread_step_s)
    table = read_table(path)
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0] or path.name
    if not columns and is_windows(table):
        return draw_windows(
            table,
            name=name,
            seed=seed,
            start_s=start_s,
            duration_s=duration_s,
            keep_share=keep_share,
            max_requests=max_drawn_requests,
        )
    trace = _read_rows(table, name, columns, seed, spread_step_s)
    is_part = start_s > 0 or duration_s is not None or keep_share < 1
    if is_part:
        trace = window(trace, start_s, float("inf") if duration_s is None else start_s + duration_s)
        trace = thin(trace, keep_share, seed)
    if not trace.requests:
        raise ConfigError(f"{path}: no request falls into the part chosen; choose a longer one")
    if is_part:
        trace = window(trace, trace.requests[0].arrival_s, float("inf"))
    return trace


def _check_arguments(
    start_s: float, duration_s: float | None, keep_share: float, max_drawn_requests: int
) -> None:
    if not 0 <= start_s < float("inf"):
        raise ConfigError(f"start_s must be at least 0, not {start_s}")
    if duration_s is not None and not duration_s > 0:
        raise ConfigError(f"duration_s must be above 0, not {duration_s}")
    if not 0 < keep_share <= 1:
        raise ConfigError(f"keep_share must be above 0 and at most 1, not {keep_share}")
    if max_drawn_requests < 1:
        raise ConfigError(f"max_drawn_requests must be at least 1, not {max_drawn_requests}")


def _read_rows(
    table: Table, name: str, columns: Mapping[str, str] | None, seed: int, step_s: float | None
) -> Trace:
    """One request a row."""
    names = find_columns(table, columns)
    exact = EXACT in table.columns and table.columns[EXACT][0] is True
    times_s = read_times(table, names.arrival, names.arrival_unit, exact=exact)
    prompts = token_counts(table, names.prompt_tokens)
    outputs = token_counts(table, names.output_tokens)
    hashes, hash_block_tokens = read_hashes(table, names, prompts)

    usable = (prompts > 0) & (outputs > 0)
    if not usable.any():
        raise ConfigError(f"{table.path}: no row has both {names.prompt_tokens} and {names.output_tokens}")
    if not usable.all():
        _log.warning(
            "%s: %d of %d rows have no prompt or no output tokens and are left out",
            table.path, len(usable) - usable.sum(), len(usable),
        )  # fmt: skip
    order = np.argsort(times_s, kind="stable")
    order = order[usable[order]]
    times_s = times_s[order]
    if not exact:
        step_s = coarse_step_s(times_s) if step_s is None else step_s
        if step_s:
            times_s = spread(times_s, step_s, np.random.default_rng(seed))
        times_s = times_s - times_s[0]
    requests = tuple(
        TraceRequest(
            arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, block_hashes=hashes[row]
        )
        for arrival_s, prompt, output, row in zip(
            times_s.tolist(), prompts[order].tolist(), outputs[order].tolist(), order.tolist(), strict=True
        )
    )
    return Trace(name=name, requests=requests, hash_block_tokens=hash_block_tokens)
