"""Which column of a trace file holds what, by explicit mapping or by common names; token counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError
from simulator.traces.table import Cell, Table

UNITS = ("s", "ms", "us", "ns", "datetime")

_GUESSES = {
    "arrival_s": (
        "arrival", "arrivaltime", "arrivedat", "arrivaltimestamp", "timestamp", "ts", "requesttime",
        "requesttimestamp", "starttime", "createdat", "datetime", "time", "t",
    ),
    "prompt_tokens": (
        "prompttokens", "inputlength", "inputtokens", "contexttokens", "numprefilltokens", "requesttokens",
        "numprompttokens", "numinputtokens", "promptlength", "promptlen", "inputlen", "prefilltokens", "isl",
    ),
    "output_tokens": (
        "outputtokens", "outputlength", "generatedtokens", "numdecodetokens", "responsetokens",
        "completiontokens", "numoutputtokens", "numgeneratedtokens", "outputlen", "decodetokens", "osl",
    ),
    "block_hashes": ("hashids", "blockhashes", "blockids", "prefixhashes"),
    "hash_block_tokens": ("hashblocktokens",),
}  # fmt: skip
"""Names in common use, lower case and without separators, the likeliest first."""

_REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
_UNIT_NAMES = {
    "s": "s", "sec": "s", "secs": "s", "seconds": "s", "ms": "ms", "millis": "ms", "us": "us", "ns": "ns",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnNames:
    """Where a trace's fields are."""

    arrival: str
    arrival_unit: str | None
    """One of ``UNITS``; None: nothing but the values can tell."""
    prompt_tokens: str
    output_tokens: str
    block_hashes: str | None
    hash_block_tokens: str | int | None
    """A column, or the number itself."""


def squash(name: str) -> str:
    """A name without case and separators: ``ContextTokens``, ``context_tokens`` -> ``contexttokens``."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_columns(table: Table, columns: Mapping[str, str] | None) -> ColumnNames:
    """Resolves the mapping against the file; fields it does not name are guessed.

    Raises:
        core.errors.ConfigError: an unknown field, a column that is not there, or none that can be guessed.
    """
    mapping = dict(columns or {})
    for field in mapping:
        if field not in _GUESSES:
            raise ConfigError(f"unknown trace field {field!r}; the fields are {', '.join(_GUESSES)}")
    found = {field: _find(table, field, mapping.get(field)) for field in _GUESSES}
    for field in _REQUIRED:
        if found[field] is None:
            raise ConfigError(
                f"{table.path}: no column for {field} among {_listed(table.columns)}; "
                f"name it, as in {field}=<column>"
            )
    arrival, unit = found["arrival_s"], None
    assert arrival is not None
    if arrival not in table.columns:
        arrival, unit = arrival.rsplit(":", 1)
    size: str | int | None = found["hash_block_tokens"]
    if isinstance(size, str) and size not in table.columns:
        size = int(size)
        if size < 1:
            raise ConfigError(f"hash_block_tokens must be at least 1, not {size}")
    prompt, output = found["prompt_tokens"], found["output_tokens"]
    assert prompt is not None
    assert output is not None
    return ColumnNames(
        arrival=arrival,
        arrival_unit=unit or _unit_in_name(arrival) or _unit_of_format(table, arrival),
        prompt_tokens=prompt,
        output_tokens=output,
        block_hashes=found["block_hashes"],
        hash_block_tokens=size,
    )


def _find(table: Table, field: str, wanted: str | None) -> str | None:
    if wanted is not None:
        if wanted in table.columns:
            return wanted
        column, _, unit = wanted.rpartition(":")
        if field == "arrival_s" and column in table.columns:
            if unit in UNITS:
                return wanted
            raise ConfigError(f"unknown unit of time {unit!r} in {wanted!r}; use one of {', '.join(UNITS)}")
        if field == "hash_block_tokens" and wanted.isdecimal():
            return wanted
        raise ConfigError(
            f"{table.path}: no column {wanted!r} for {field}; the columns are {_listed(table.columns)}"
        )
    by_name = {squash(name): name for name in reversed(table.columns)}
    if field == "arrival_s":
        by_name = {squash(_without_unit(name)): name for name in reversed(table.columns)} | by_name
    return next((by_name[guess] for guess in _GUESSES[field] if guess in by_name), None)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _without_unit(name: str) -> str:
    stem, _, last = name.rpartition("_")
    return stem if stem and last.lower() in _UNIT_NAMES else name


def _unit_in_name(name: str) -> str | None:
    stem, _, last = name.rpartition("_")
    return _UNIT_NAMES.get(last.lower()) if stem else None


def _unit_of_format(table: Table, arrival: str) -> str | None:
    """The unit that a published format fixes.

    Mooncake (FAST'25) counts milliseconds. The Qwen-Bailian traces have the same keys beside a
    ``chat_id`` and count seconds, as BurstGPT does.
    """
    if arrival == "timestamp" and {"input_length", "output_length"} <= table.columns.keys():
        return "s" if "chat_id" in table.columns else "ms"
    if arrival == "Timestamp" and {"Request tokens", "Response tokens"} <= table.columns.keys():
        return "s"
    return None


def token_counts(table: Table, column: str) -> npt.NDArray[np.int64]:
    """A column as counts; 0 where a row has none.

    Raises:
        core.errors.ConfigError: a cell is no whole number, or negative.
    """
    cells = table.columns[column]
    counts = np.empty(len(cells), dtype=np.int64)
    for row, cell in enumerate(cells):
        count = _count(cell)
        if count is None or not 0 <= count < 2**53:
            raise table.error(row, f"{column} is {cell!r}; give a whole number of tokens")
        counts[row] = count
    return counts


def _count(cell: Cell) -> int | None:
    if type(cell) is int:
        return cell
    if cell is None:
        return 0
    if not isinstance(cell, str):
        return None
    if cell.isascii() and cell.isdigit() and len(cell) < 20:
        return int(cell)
    if cell.strip().lower() in ("", "nan", "na", "null", "none"):
        return 0
    try:
        value = float(cell)
    except ValueError:
        return None
    return int(value) if value.is_integer() else None
