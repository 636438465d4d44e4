"""A server in a process of its own: started, awaited and ended within limits, its output kept."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

HOST = "127.0.0.1"
_ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """One server and everything it starts, as a process group.

    Its standard input is a pipe from here: it ends when that closes, hence also when this process is
    gone, however it went.

    Args:
        log: file for the server's output; its end is part of every error.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                command,
                cwd=_ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """
        Raises:
            RuntimeError: the server ended.
            TimeoutError: it was not ready in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while not ready():
            if self._popen.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self._popen.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self.name} not ready after {timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(0.2)

    def send_line(self, line: str) -> None:
        """Writes to its standard input."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{line}\n".encode())
        self._popen.stdin.flush()

    def stop(self, grace_s: float) -> None:
        """Lets it end by itself; kills what is left of the group after ``grace_s``."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(10)

    def log_tail(self, num_bytes: int = 4000) -> str:
        return self._log.read_bytes()[-num_bytes:].decode(errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether something serves ``url`` with status 200."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2.0).status_code == 200
    return False
