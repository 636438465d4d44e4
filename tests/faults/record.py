"""What fault tests found, kept for docs/reliability.md.

A test says which row of the fault matrix it is with ``@pytest.mark.fault_row(4)`` or, with what it measured,
``fault_report.record(row=4, served=12, ...)``. Where ``BATON_FAULT_REPORT`` names a folder, the results of a
run go to ``faults.json`` there, in place of what an earlier run said of the same tests, and a table of them
to ``faults.md``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

FOLDER_VARIABLE = "BATON_FAULT_REPORT"
RESULTS = "faults.json"
TABLE = "faults.md"
_MARKER = "fault_row(number): the row of the fault matrix that a test is about"
_found = pytest.StashKey[dict[str, dict[str, Any]]]()
_measured = pytest.StashKey[list[dict[str, Any]]]()


class FaultReport:
    """Of one test."""

    def __init__(self, item: pytest.Item) -> None:
        self._records = item.stash.setdefault(_measured, [])

    def record(self, *, row: int, what: str = "", **measured: Any) -> None:
        """Notes a result under a row; whether it is one to be proud of, the test's own outcome says.

        Args:
            what: the fault in a few words; the test's name if it is not given.
            measured: named as the fields of ``tests.faults.row.Result`` where they mean the same.
        """
        self._records.append({"row": row, "what": what, **measured})


def configure(config: pytest.Config) -> None:
    """Call from ``pytest_configure``."""
    config.addinivalue_line("markers", _MARKER)
    config.stash[_found] = {}


def note_outcome(item: pytest.Item, report: pytest.TestReport) -> None:
    """Call with each report of a test's phases."""
    skipped = report.when == "setup" and report.skipped
    if report.when != "call" and not skipped and not (report.when == "setup" and report.failed):
        return
    records = item.stash.get(_measured, [])
    marked = {marker.args[0] for marker in item.iter_markers("fault_row")}
    records = [*records, *({"row": row} for row in marked - {each["row"] for each in records})]
    for number, record in enumerate(records):
        item.config.stash[_found][f"{item.nodeid} {number}"] = {
            **record,
            "what": record.get("what") or item.name.removeprefix("test_").replace("_", " "),
            "test": item.nodeid,
            "result": report.outcome,
            "why": str(report.longrepr[2]) if skipped and isinstance(report.longrepr, tuple) else "",
        }


def write_results(config: pytest.Config) -> None:
    """Call when the session ends."""
    folder, found = os.environ.get(FOLDER_VARIABLE), config.stash.get(_found, {})
    if folder and found:
        save_results(Path(folder), found)


def save_results(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    """Puts results, by test, in place of older ones of the same tests."""
    from tests.faults.report import table

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= found
    path.write_text(json.dumps(results, indent=1) + "\n")
    (folder / TABLE).write_text(table(results.values()) + "\n")
