"""Directories of processes: private, and removed after those that could not do it themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from engine.own_directory import OwnDirectory

PREFIX = "own-"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_is_private_and_goes_with_all_that_is_in_it(folder: Path) -> None:
    own = OwnDirectory(PREFIX)
    assert own.path.parent == folder
    assert own.path.stat().st_mode & 0o077 == 0
    (own.path / "socket").touch()
    own.remove()
    own.remove()
    assert not names(folder)


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    program = """
        import os
        from engine.own_directory import OwnDirectory
        print(OwnDirectory("own-").path, flush=True)
        os._exit(1)
    """
    environment = {**os.environ, "TMPDIR": str(folder)}
    left = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    path = Path(left.stdout.strip())
    assert path.parent == folder
    assert path.is_dir()
    own = OwnDirectory(PREFIX)
    assert names(folder) == {own.path.name}


def test_those_of_the_living_and_of_others_stay(folder: Path) -> None:
    (folder / f"{PREFIX}foreign").mkdir()
    first = OwnDirectory(PREFIX)
    second = OwnDirectory(PREFIX)
    assert names(folder) == {first.path.name, second.path.name, f"{PREFIX}foreign"}
