"""`baton demo` as a stranger runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.baton_command import Commands

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]


def test_the_demo_shows_who_did_what_and_a_switch_and_leaves_nothing(tmp_path: Path) -> None:
    commands = Commands(tmp_path, {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    try:
        done = commands.run("demo", timeout_s=440)
        left = commands.left_running()
    finally:
        commands.end_all()
    assert done.returncode == 0, done.stderr
    assert left == []

    table, _, rest = done.stdout.partition("time of each leg")
    paths: dict[str, int] = {}
    for line in table.splitlines():
        number, *cells = line.split() or [""]
        if not number.isdigit():
            continue
        path = next(cell for cell in cells if cell in ("remote_early", "remote", "local"))
        prefilled_by, decoded_by, moved, unit = cells[cells.index(path) + 1 :][:4]
        paths[path] = paths.get(path, 0) + 1
        if path == "local":
            assert (prefilled_by, moved) == (decoded_by, "-")
        else:
            assert prefilled_by != decoded_by
            assert float(moved) > 0
            assert unit == "MB"
    assert paths == {"remote_early": 6, "remote": 1, "local": 1}

    switched = re.search(r"(\S+) changed from decode to prefill: (.+) \(decision \d+\)\.", rest)
    assert switched is not None, rest
    assert "of the requests" in switched[2], "the planner's reason"
    assert re.search(r"\d+ requests were on their way and went on; it prefilled [1-9]\d*\.", rest), rest
    assert "all answered" in rest
    workers = [line for line in rest.partition("\nworkers")[2].splitlines() if "%" in line]
    assert [sum(f" {role} " in line for line in workers) for role in ("prefill", "decode")] == [3, 1]
    assert any(switched[1] in line and " prefill " in line for line in workers)
