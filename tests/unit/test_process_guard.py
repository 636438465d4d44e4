"""Every process of a cluster ends with the program that started it, however that ends."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

_PROGRAM = """
import subprocess, sys
from deploy.processes import ProcessGuard

guard = ProcessGuard()
guard.watch()
child = subprocess.Popen(["sleep", "120"], start_new_session=True)
print(child.pid, guard.mark, flush=True)
sys.stdin.readline()
guard.end_all(grace_s=0)
"""


@pytest.mark.parametrize("end", ["in order", "killed"])
def test_whoever_outlives_the_program_is_ended(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        pid, mark = program.stdout.readline().split()
        child = psutil.Process(int(pid))
        (watcher,) = [each for each in psutil.Process(program.pid).children() if mark in each.cmdline()]
        if end == "killed":
            program.kill()
        else:
            program.stdin.write("\n")
            program.stdin.flush()
        _, alive = psutil.wait_procs([child, watcher], timeout=20)
        assert alive == []
