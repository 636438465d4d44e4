"""The rules of a run hold: leaks fail it, a signal ends it cleanly, what failed may be tried once more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
AGAIN = CONFTEST.parents[1] / ".ci/again.py"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    shutil.copy(CONFTEST, tmp_path)
    return tmp_path


def start_pytest(folder: Path, test_code: str) -> subprocess.Popen[str]:
    (folder / "test_inner.py").write_text(test_code)
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "--rootdir", folder, folder],
        cwd=folder,
        env={**os.environ, "BATON_TEST_GRACE_S": "0.5"},
        stdout=subprocess.PIPE,
        text=True,
    )


def is_whole(folder: Path) -> bool:
    """Whether the run came to its end and left nothing behind, as it noted itself."""
    return bool(json.loads((folder / ".pytest_cache/v/baton/whole").read_text()))


@pytest.mark.parametrize("start_new_session", [False, True])
def test_a_process_that_outlives_the_run_fails_it_and_is_ended(
    run_folder: Path, start_new_session: bool
) -> None:
    """Its parent is gone and it may have its own session, as the daemons of a cluster do."""
    code = f"""
import pathlib, subprocess, sys

def test_leaks():
    starter = (
        "import subprocess;"
        "print(subprocess.Popen(['sleep', '300'], start_new_session={start_new_session}, stdout=2).pid)"
    )
    pid = subprocess.check_output([sys.executable, "-c", starter], text=True)
    pathlib.Path("pid").write_text(pid)
"""
    run = start_pytest(run_folder, code)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    pid = int((run_folder / "pid").read_text())
    assert f"LEAKED PROCESS (now killed): {pid} sleep 300" in output
    assert not is_whole(run_folder)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_run_that_leaves_nothing_passes(run_folder: Path) -> None:
    run = start_pytest(run_folder, "import subprocess\ndef test_ok(): subprocess.run(['true'], check=True)\n")
    run.communicate(timeout=60)
    assert run.returncode == 0
    assert is_whole(run_folder)


def test_sigterm_tears_fixtures_down(run_folder: Path) -> None:
    code = """
import pathlib, time, pytest

@pytest.fixture(scope="session")
def cluster():
    yield
    pathlib.Path("torn-down").touch()

def test_long(cluster):
    pathlib.Path("started").touch()
    time.sleep(60)
"""
    run = start_pytest(run_folder, code)
    deadline = time.monotonic() + 30
    while not (run_folder / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=30)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert not is_whole(run_folder)
    assert (run_folder / "torn-down").exists()


@pytest.mark.parametrize(
    ("test_code", "first", "again"),
    [
        ("def test_ok(): pass\n", 0, 1),
        ("def test_bad(): raise ValueError\n", 1, 1),
        (
            "import pathlib\n"
            "def test_once():\n"
            "    tried = pathlib.Path('tried')\n"
            "    again = tried.exists()\n"
            "    tried.touch()\n"
            "    assert again\n",
            1,
            0,
        ),
        ("import no_such_module\n", 2, 1),
    ],
    ids=["nothing failed", "fails twice", "fails once", "never ran"],
)
def test_what_failed_gets_a_second_try(run_folder: Path, test_code: str, first: int, again: int) -> None:
    run = start_pytest(run_folder, test_code)
    run.communicate(timeout=60)
    assert run.returncode == first
    command = [sys.executable, AGAIN, "-q", "--rootdir", run_folder]
    second = subprocess.run(command, cwd=run_folder, capture_output=True, timeout=60)
    assert second.returncode == again, second.stdout
