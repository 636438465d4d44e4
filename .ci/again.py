"""Tries what failed in the last run of the tests once more; fails if it fails again.

    python .ci/again.py PYTEST_ARGUMENT...

A run that was cut short, or that left processes behind, gets no second try: nobody knows what it missed. What
a test says of those before it, it says of whole files: they are tried whole. Faults stand alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_CACHE = Path(".pytest_cache/v")
_STAND_ALONE = "tests/faults/test_rows.py"


def tests_to_try(failed: list[str]) -> list[str]:
    """Names for pytest."""
    return sorted({each if each.startswith(_STAND_ALONE) else each.partition("::")[0] for each in failed})


def main() -> None:
    if not json.loads((_CACHE / "baton/whole").read_text()):
        sys.exit("no second try: the run did not come to its end, or left processes behind")
    failed = list(json.loads((_CACHE / "cache/lastfailed").read_text()))
    if not failed:
        sys.exit("no second try: it is not tests that failed")
    command = [sys.executable, "-m", "pytest", "--maxfail", "1", *sys.argv[1:], *tests_to_try(failed)]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
