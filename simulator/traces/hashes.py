"""Block hashes of a recorded trace: how many tokens a piece has, and which pieces are full."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError
from simulator.traces.columns import ColumnNames
from simulator.traces.table import Cell, Table

MOONCAKE_BLOCK_TOKENS = 512
_OTHER_SIZES = (16, 32, 64, 128, 256, 1024, 2048, 4096, 8, 4, 1)

Ints = npt.NDArray[np.int64]


def read_hashes(table: Table, names: ColumnNames, prompt_tokens: Ints) -> tuple[list[tuple[int, ...]], int]:
    """Names of each row's full pieces, and the tokens of a piece.

    A last piece that the prompt does not fill is dropped: no engine caches it. Where nothing states
    the size, 512 (Mooncake) is taken unless the counts rule it out and fit another usual size. Names
    that are not whole numbers are numbered in order of appearance.

    Args:
        table: the file.
        names: its columns.
        prompt_tokens: (rows,).

    Raises:
        core.errors.ConfigError: a cell is no list, or no size fits.
    """
    if names.block_hashes is None:
        size = names.hash_block_tokens
        return [()] * len(table.lines), size if isinstance(size, int) else MOONCAKE_BLOCK_TOKENS
    cells = table.columns[names.block_hashes]
    rows = [_hash_list(table, row, names.block_hashes, cell) for row, cell in enumerate(cells)]
    size = _stated_size(table, names) or _fitting_size(table, rows, prompt_tokens)
    num_full = (prompt_tokens // size).tolist()
    full = [row[:num] for row, num in zip(rows, num_full, strict=True)]
    if all(type(piece) is int for row in full for piece in row):
        return [tuple(cast(Sequence[int], row)) for row in full], size
    numbers: dict[str, int] = {}
    return [tuple(numbers.setdefault(str(piece), len(numbers)) for piece in row) for row in full], size


def _hash_list(table: Table, row: int, column: str, cell: Cell) -> Sequence[object]:
    if isinstance(cell, list):
        return cell
    if cell is None:
        return ()
    if isinstance(cell, str):
        text = cell.strip()
        if not text.startswith("["):
            return [int(word) if word.isdecimal() else word for word in text.replace(";", " ").split()]
        try:
            pieces = json.loads(text)
        except ValueError:
            pieces = None
        if isinstance(pieces, list):
            return pieces
    raise table.error(row, f"{column} is no list of block hashes; write [1, 2, 3]")


def _stated_size(table: Table, names: ColumnNames) -> int:
    stated = names.hash_block_tokens
    if stated is None or isinstance(stated, int):
        return stated or 0
    sizes = {str(cell) for cell in table.columns[stated] if cell not in (None, "")}
    if len(sizes) != 1 or not (size := sizes.pop()).isdecimal() or not int(size):
        raise ConfigError(f"{table.path}: {stated} must be one whole number of tokens, the same in every row")
    return int(size)


def _fitting_size(table: Table, rows: list[Sequence[object]], prompt_tokens: Ints) -> int:
    num_pieces = np.array([len(row) for row in rows])
    if np.all(num_pieces <= -(-prompt_tokens // MOONCAKE_BLOCK_TOKENS)):
        return MOONCAKE_BLOCK_TOKENS
    hashed = num_pieces > 0
    for size in _OTHER_SIZES:
        for num_expected in (-(-prompt_tokens // size), prompt_tokens // size):
            if np.all(num_pieces[hashed] == num_expected[hashed]):
                return size
    row = int(np.argmax(num_pieces > -(-prompt_tokens // MOONCAKE_BLOCK_TOKENS)))
    raise table.error(
        row,
        f"{num_pieces[row]} block hashes for {prompt_tokens[row]} tokens; say how many tokens a hash "
        f"stands for, as in hash_block_tokens=16",
    )
