"""Where results go: one JSON file, and the marked blocks of documents.

The text around the blocks is written by hand; a run replaces only the tables it measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.table import Table

_ROOT = Path(__file__).parent.parent
DOCUMENT = _ROOT / "docs" / "benchmarks.md"
SIMULATOR = _ROOT / "docs" / "simulator.md"
RESULTS = Path(__file__).parent / "results" / "latest.json"


def save(section: str, result: Any, tables: Iterable[Table], document: Path = DOCUMENT) -> None:
    """Keeps a section's figures and puts its tables into a document.

    Raises:
        ValueError: the document has no block of that name.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[section] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(_rounded(results), indent=1) + "\n")
    text = document.read_text()
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{document} has no block {begin} ... {end}")
    body = "\n\n".join(table.markdown() for table in tables)
    document.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}")


def _rounded(value: Any) -> Any:
    """Five digits are more than any of this is worth."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return value
