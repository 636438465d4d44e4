"""Performance profiles from published pairs of CSV tables, ``X_prefill.csv`` and ``X_decode.csv``.

Two families, told apart by their columns; columns not named here are ignored::

    measured (ai-dynamo profiler)   prompt_tokens, ttft_ms
                                    itl_ms, context_tokens, and two of kv_usage, max_kv_tokens,
                                    implied_batch
    composed (aiconfigurator)       prompt_tokens, prefill_ms
                                    itl_ms, batch, context

Either may carry ``model``, ``gpu``, ``gemm_dtype`` and ``tp``, by which rows are selected, and ``flag``:
rows flagged as extrapolated were not measured and are left out. ``context_tokens`` in the prefill
table counts cached tokens. Composed tables hold operator times, so serving overhead is added to them.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import ConfigError
from core.performance_model import KvLink
from core.performance_profile import DecodePoint, PerformanceProfile, PrefillPoint

Row = Mapping[str, str]

_COLUMNS = {"model": "model", "gpu": "gpu", "dtype": "gemm_dtype", "tp": "tp"}
"""Column by selection key."""
_ALIASES = {"bf16": "bfloat16", "fp16": "float16"}
_KV_BYTES_PER_TOKEN = {"8b": 131_072, "70b": 327_680}
"""Llama 3 in 16 bit: layers * 8 KV heads * 128 * 2 (K and V) * 2 bytes; 32 and 80 layers."""

_LINK = KvLink(latency_s=0.001, bytes_per_s=40e9)
"""One NIC of 400 Gbit/s, less what protocols take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvOptions:
    """What to take from a pair of tables, and what tables do not say."""

    selection: Mapping[str, str] = field(default_factory=dict)
    """Values of ``model``, ``gpu``, ``dtype`` and ``tp``; needed where the tables hold more than one."""
    prefill_overhead_s: float = 0.020
    """Added to each prompt of a composed table."""
    decode_overhead_s_per_seq: float = 0.00003
    """Added to each decode step of a composed table, times its sequences."""
    name: str = ""
    """Empty: the tables' common file name and the selection."""
    source: str = ""
    """Empty: the tables' paths."""
    model: str = ""
    """Empty: the ``model`` column, else the tables' common file name."""
    accelerator: str = ""
    """Empty: the ``gpu`` column, else unknown."""
    gpus_per_worker: int | None = None
    """None: the ``tp`` column, else 1."""
    kv_capacity_tokens: int | None = None
    """None: ``max_kv_tokens``, else from ``kv_usage_est``, else the most KV of any point."""
    kv_bytes_per_token: int | None = None
    """None: known for Llama 3 8B and 70B by the model's name, else that of 8B."""
    block_size_tokens: int = 16
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    link: KvLink = _LINK


def selection_of(text: str) -> dict[str, str]:
    """``model=llama-3.1-8b,tp=2`` as a selection.

    Raises:
        ConfigError: it is not of that form.
    """
    selection = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key not in _COLUMNS or not equals or not value:
            raise ConfigError(f"{part!r} selects nothing: write {', '.join(_COLUMNS)} as key=value")
        selection[key] = _ALIASES.get(value, value)
    return selection


def is_table(path: Path) -> bool:
    """True for one of a pair of tables, or for what their names have in common."""
    return path.suffix == ".csv" or (not path.is_file() and any(side.exists() for side in _pair(path)))


def read_tables(path: Path, options: CsvOptions) -> PerformanceProfile:
    """The profile in a pair of tables.

    Args:
        path: either table or their common prefix.
        options: see there.

    Raises:
        ConfigError: a table, a column or a selection is missing, or a value is no number.
    """
    prefill_path, decode_path = _pair(path)
    prefill_rows = _select(prefill_path, _read(prefill_path), options.selection)
    decode_rows = _select(decode_path, _read(decode_path), options.selection)
    first = {
        column: prefill_rows[0].get(column) or decode_rows[0].get(column) for column in _COLUMNS.values()
    }
    for key in options.selection:
        if not first[_COLUMNS[key]]:
            raise ConfigError(
                f"{decode_path} has no column {_COLUMNS[key]!r}: drop {key}= from the selection"
            )
    stem = prefill_path.name.removesuffix("_prefill.csv")
    labels = [label for label in first.values() if label]
    model = options.model or first["model"] or stem
    tp = first["tp"]
    decode = [_decode_point(decode_path, row, options) for row in decode_rows]
    capacity, capacity_note = _capacity(decode_path, decode_rows, decode, options)
    kv_bytes, kv_bytes_note = _kv_bytes_per_token(model, options)
    notes = [note for note in (capacity_note, kv_bytes_note, _overhead_note(prefill_rows, options)) if note]
    return PerformanceProfile(
        name=options.name or "-".join([stem, *labels]),
        source=". ".join([options.source or f"{prefill_path.name} and {decode_path.name}", *notes]),
        model=model,
        accelerator=options.accelerator or first["gpu"] or "unknown",
        gpus_per_worker=(int(tp) if tp else 1)
        if options.gpus_per_worker is None
        else options.gpus_per_worker,
        kv_capacity_tokens=capacity,
        block_size_tokens=options.block_size_tokens,
        kv_bytes_per_token=kv_bytes,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        prefill=tuple(_prefill_point(prefill_path, row, options) for row in prefill_rows),
        decode=tuple(decode),
        link=options.link,
    )


def _pair(path: Path) -> tuple[Path, Path]:
    stem = path.name.removesuffix(".csv").removesuffix("_prefill").removesuffix("_decode").rstrip("_")
    return path.with_name(f"{stem}_prefill.csv"), path.with_name(f"{stem}_decode.csv")


def _read(path: Path) -> Sequence[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows: list[Row] = [
                {key.strip(): (value or "").strip() for key, value in row.items() if isinstance(key, str)}
                for row in csv.DictReader(line for line in file if not line.startswith("#"))
            ]
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; a profile needs a pair X_prefill.csv and X_decode.csv"
        ) from error
    rows = [row for row in rows if "extrap" not in row.get("flag", "").lower()]
    if not rows:
        raise ConfigError(f"{path} has no measured rows")
    return rows


def _select(path: Path, rows: Sequence[Row], selection: Mapping[str, str]) -> Sequence[Row]:
    columns = [(key, column) for key, column in _COLUMNS.items() if any(row.get(column) for row in rows)]
    wanted = [(column, selection[key]) for key, column in columns if key in selection]
    chosen = [row for row in rows if all(row[column] == value for column, value in wanted)]
    kinds = {tuple(row[column] for _, column in columns) for row in chosen or rows}
    if not chosen or len(kinds) > 1:
        there = "; ".join(
            ",".join(f"{key}={value}" for (key, _), value in zip(columns, kind, strict=True))
            for kind in sorted(kinds)
        )
        problem = "holds more than one profile" if chosen else "holds no profile of that selection"
        raise ConfigError(f"{path} {problem}: select one of {there}")
    return chosen


def _number(path: Path, row: Row, *columns: str) -> float | None:
    """The first of the columns that has a value."""
    for column in columns:
        if row.get(column):
            try:
                return float(row[column])
            except ValueError as error:
                raise ConfigError(f"{path}: {column} {row[column]!r} is no number") from error
    return None


def _need(path: Path, row: Row, *columns: str) -> float:
    value = _number(path, row, *columns)
    if value is None or not math.isfinite(value):
        raise ConfigError(f"{path} needs a number in column {' or '.join(columns)} of every row")
    return value


def _prefill_point(path: Path, row: Row, options: CsvOptions) -> PrefillPoint:
    seconds = _need(path, row, "ttft_ms", "prefill_ms") / 1e3
    if not row.get("ttft_ms"):
        seconds += options.prefill_overhead_s
    return PrefillPoint(
        prompt_tokens=round(_need(path, row, "prompt_tokens")),
        context_tokens=round(_number(path, row, "context_tokens") or 0),
        seconds=seconds,
    )


def _decode_point(path: Path, row: Row, options: CsvOptions) -> DecodePoint:
    seconds = _need(path, row, "itl_ms") / 1e3
    if row.get("batch"):
        num_decoding = max(1, round(_need(path, row, "batch")))
        kv_tokens = num_decoding * _need(path, row, "context", "context_tokens")
        seconds += options.decode_overhead_s_per_seq * num_decoding
    else:
        kv_usage, capacity = _number(path, row, "kv_usage"), _number(path, row, "max_kv_tokens")
        capacity = capacity or options.kv_capacity_tokens
        batch = _number(path, row, "implied_batch")
        if kv_usage is not None and capacity:
            kv_tokens = kv_usage * capacity
            batch = batch or kv_tokens / _need(path, row, "context_tokens", "context")
        elif batch:
            kv_tokens = batch * _need(path, row, "context_tokens", "context")
        else:
            raise ConfigError(
                f"{path} needs batch, implied_batch, or kv_usage with max_kv_tokens in every row"
            )
        num_decoding = max(1, round(batch))
    return DecodePoint(num_decoding=num_decoding, kv_tokens=round(kv_tokens), seconds=seconds)


def _capacity(
    path: Path, rows: Sequence[Row], points: Sequence[DecodePoint], options: CsvOptions
) -> tuple[int, str]:
    """KV capacity in tokens, and a note unless it is given or measured."""
    if options.kv_capacity_tokens is not None:
        return options.kv_capacity_tokens, ""
    measured = [capacity for row in rows if (capacity := _number(path, row, "max_kv_tokens"))]
    if measured:
        return round(max(measured)), ""
    # The row of most use: its share has the most digits.
    usages = [(_number(path, row, "kv_usage_est") or 0.0) for row in rows]
    usage, kv_tokens = max((usage, point.kv_tokens) for usage, point in zip(usages, points, strict=True))
    if usage > 0:
        return int(kv_tokens / usage), "KV capacity estimated from kv_usage_est"
    return max(point.kv_tokens for point in points), "KV capacity taken as the most KV of any point"


def _kv_bytes_per_token(model: str, options: CsvOptions) -> tuple[int, str]:
    if options.kv_bytes_per_token is not None:
        return options.kv_bytes_per_token, ""
    for size, num_bytes in _KV_BYTES_PER_TOKEN.items():
        if re.search(rf"llama.*(?<![\d.]){size}", model.lower()):
            return num_bytes, ""
    return _KV_BYTES_PER_TOKEN["8b"], "KV bytes per token assumed to be those of Llama 3 8B"


def _overhead_note(prefill_rows: Sequence[Row], options: CsvOptions) -> str:
    if prefill_rows[0].get("ttft_ms"):
        return ""
    return (
        f"Serving overhead added: {options.prefill_overhead_s * 1e3:g} ms a prompt, "
        f"{options.decode_overhead_s_per_seq * 1e3:g} ms a sequence and decode step"
    )
