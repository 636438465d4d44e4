"""`baton demo` as a stranger runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.baton_command import Commands

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_the_demo_shows_who_did_what_and_leaves_nothing(tmp_path: Path) -> None:
    commands = Commands(tmp_path, {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    try:
        done = commands.run("demo", timeout_s=280)
        left = commands.left_running()
    finally:
        commands.end_all()
    assert done.returncode == 0, done.stderr
    assert left == []

    table = done.stdout.split("time of each leg")[0]
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
    workers = [line for line in done.stdout.splitlines() if "%" in line]
    assert [sum(f" {role} " in line for line in workers) for role in ("prefill", "decode")] == [2, 2]
