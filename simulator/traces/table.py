"""Reads a CSV or JSONL file, gzipped or not, as named columns of raw cells."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError

Cell = int | str | bool | list[object] | dict[str, object] | None
"""A raw value. JSON numbers with a fraction stay text, so that no digit is lost before its unit is known."""

_GZIP_MAGIC = b"\x1f\x8b"
_JSON = json.JSONDecoder(parse_float=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A file's rows by column; all columns have the length of ``lines``."""

    path: Path
    lines: list[int]
    """The line each row ends on, from 1."""
    columns: dict[str, list[Cell]]

    def error(self, row: int, problem: str) -> ConfigError:
        """What is wrong with one row."""
        return ConfigError(f"{self.path}, line {self.lines[row]}: {problem}")


def read_table(path: Path) -> Table:
    """Reads a file whose first line tells its format: ``{`` begins JSONL, anything else a CSV header.

    Raises:
        core.errors.ConfigError: the file cannot be read, is empty, or a line does not fit the format.
    """
    text = _read_text(path)
    start = text.lstrip()[:1]
    if not start:
        raise ConfigError(f"{path} is empty; give a trace with at least one request")
    if start == "[":
        raise ConfigError(f"{path} is one JSON array; write one JSON object a line instead")
    table = _read_jsonl(path, text) if start == "{" else _read_csv(path, text)
    if not table.lines:
        raise ConfigError(f"{path} has a header but no rows; give a trace with at least one request")
    return table


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; check the path of the trace") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text; a trace is CSV or JSONL, or either one gzipped") from error


def _read_jsonl(path: Path, text: str) -> Table:
    lines: list[int] = []
    rows: list[dict[str, Cell]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _JSON.decode(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error}); is the file cut off?") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object; write one object a line")
        lines.append(number)
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path=path, lines=lines, columns={name: [row.get(name) for row in rows] for name in names})


def _read_csv(path: Path, text: str) -> Table:
    header = text.lstrip().split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    names: list[str] | None = None
    lines: list[int] = []
    rows: list[list[str]] = []
    try:
        for row in reader:
            if not row or (len(row) == 1 and not row[0].strip()):
                continue
            if names is None:
                names = [name.strip() for name in row]
                continue
            if len(row) != len(names):
                raise ConfigError(
                    f"{path}, line {reader.line_num}: {len(row)} cells where the header has {len(names)}"
                )
            lines.append(reader.line_num)
            rows.append(row)
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    assert names is not None, "an empty file was refused before"
    columns: dict[str, list[Cell]] = {name: [] for name in names}
    if rows:
        for name, cells in zip(names, zip(*rows, strict=True), strict=True):
            columns[name] = list(cells)
    return Table(path=path, lines=lines, columns=columns)
