"""Writes the results of the fault tests, and of the soak, into docs/reliability.md.

    BATON_FAULT_REPORT=build/faults python -m pytest tests/faults tests/integration/...
    python -m tests.faults.report build/faults

Only what is between the markers of the page is replaced.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.faults.record import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
SOAK_RESULTS = "soak.json"
_COLUMNS = (
    ("served", "served"),
    ("failed", "failed"),
    ("refused", "refused"),
    ("wrong", "wrong"),
    ("silence_p50_s", "pause p50, s"),
    ("silence_max_s", "max, s"),
    ("whole_s", "whole after, s"),
    ("leaked", "leaks"),
)


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Markdown; a row for each recorded measurement, tests that only passed or failed in one line a row."""
    lines = [
        f"| row | what is broken | result | {' | '.join(title for _, title in _COLUMNS)} |",
        f"|---|---|---|{'---|' * len(_COLUMNS)}",
    ]
    by_row: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_row[int(result["row"])].append(result)
    for row in sorted(by_row):
        measured = [each for each in by_row[row] if any(name in each for name, _ in _COLUMNS)]
        lines += [_line(row, each["what"], _outcome([each]), each) for each in measured]
        if only := [each for each in by_row[row] if each not in measured]:
            what = only[0]["what"] if len(only) == 1 else _common(only)
            lines.append(_line(row, what, _outcome(only), {}))
    return "\n".join(lines)


def _line(row: int, what: str, outcome: str, values: Mapping[str, Any]) -> str:
    cells = [_text(values.get(name)) for name, _ in _COLUMNS]
    return f"| {row} | {what} | {outcome} | {' | '.join(cells)} |"


def _outcome(results: Iterable[Mapping[str, Any]]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for each in results:
        counts[each["result"]] += 1
    if len(counts) == 1 and sum(counts.values()) == 1:
        return next(iter(counts))
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))


def _common(results: Iterable[Mapping[str, Any]]) -> str:
    files = sorted({Path(each["test"].partition("::")[0]).stem for each in results})
    return ", ".join(f"`{name}`" for name in files)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def soak_summary(soak: Mapping[str, Any]) -> str:
    """Markdown of ``soak.json``."""
    fates, kills = soak["fates"], soak["faults"]
    lines = [
        f"{soak['minutes']:g} minutes, {soak['clients']} clients, one fault every {soak['period_s']:g} s.",
        "",
        "| | |",
        "|---|---|",
        f"| requests | {soak['requests']} |",
        f"| right answers | {fates.get('right', 0)} |",
        f"| wrong answers | {fates.get('wrong', 0)} |",
        f"| failed, not through the death of a router | {soak['failed']} |",
        f"| cut by the death of their router | {soak['cut_by_router']} |",
        f"| refused with 503 before any work | {fates.get('refused', 0)} |",
        f"| KV blocks or requests held at the end | {soak['leaked']} |",
        f"| orphan processes at the end | {soak['orphans']} |",
    ]
    lines += [f"| {name.replace('_', ' ')} | {number} times |" for name, number in sorted(kills.items())]
    lines += [
        f"| memory of {name}, MiB, first and last tenth | {first:.0f}, {last:.0f} |"
        for name, (first, last) in sorted(soak["memory_mib"].items())
    ]
    return "\n".join(lines)


def put_between(text: str, name: str, content: str) -> str:
    """Replaces what stands between two markers of a page.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page lacks {begin} and {end}")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.faults.report FOLDER")
    folder, page = Path(sys.argv[1]), PAGE.read_text()
    written = []
    if (results := folder / RESULTS).exists():
        page = put_between(page, "faults", table(json.loads(results.read_text()).values()))
        written.append(RESULTS)
    if (soak := folder / SOAK_RESULTS).exists():
        page = put_between(page, "soak", soak_summary(json.loads(soak.read_text())))
        written.append(SOAK_RESULTS)
    if not written:
        sys.exit(f"{folder} has neither {RESULTS} nor {SOAK_RESULTS}")
    PAGE.write_text(page)
    print(f"{PAGE} has {' and '.join(written)} of {folder}")


if __name__ == "__main__":
    main()
