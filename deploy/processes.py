"""Every process a cluster started, found again whatever became of its parents.

Processes inherit their environment, so a mark in it survives daemons, re-parenting and new sessions.

As a program (``python -m deploy.processes MARK``) it waits until its standard input ends, which it does when
the process at the other end is gone, however it went; then it ends every process with that mark.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import psutil

MARK = "BATON_CLUSTER_RUN"
_ORPHANS_GRACE_S = 3.0
_WATCHER_LIMIT_S = 5.0


class ProcessGuard:
    """Ends what a cluster left behind; only processes born after :meth:`watch` carry its mark."""

    def __init__(self) -> None:
        self._mark: str | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    @property
    def mark(self) -> str | None:
        """Value of ``MARK`` in every process of this cluster; None before :meth:`watch`."""
        return self._mark

    def watch(self) -> None:
        """From now on, every process started from here belongs to this cluster and ends with this one."""
        mark = uuid.uuid4().hex
        # Without the mark, and out of reach of the terminal's Ctrl-C.
        command = [sys.executable, "-P", "-m", "deploy.processes", mark]
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._mark = os.environ[MARK] = mark
        # setproctitle would write the title over the environment, mark included.
        os.environ["SPT_NOENV"] = "1"

    def end_all(self, grace_s: float = 5.0) -> int:
        """Waits ``grace_s`` for the processes to end by themselves, then kills the rest.

        Returns:
            How many had to be killed.
        """
        if self._mark is None:
            return 0
        num_killed = end_marked(self._mark, grace_s)
        self._end_watcher()
        os.environ.pop(MARK, None)
        self._mark = None
        return num_killed

    def _end_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is None or watcher.stdin is None:
            return
        watcher.stdin.close()
        try:
            watcher.wait(_WATCHER_LIMIT_S)
        except subprocess.TimeoutExpired:
            watcher.kill()
            watcher.wait()


def end_marked(mark: str, grace_s: float) -> int:
    """Waits ``grace_s`` for the processes with this mark to end by themselves, then kills the rest.

    Returns:
        How many had to be killed.
    """
    deadline_s = time.monotonic() + grace_s
    while (left := list(_marked(mark))) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5.0)
    return len(left)


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.pid != os.getpid() and process.environ().get(MARK) == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE and not _is_tracker(process):
                yield process


def _is_tracker(process: psutil.Process) -> bool:
    """The standard library's own helper of this process, which ends with it."""
    return process.ppid() == os.getpid() and "resource_tracker" in " ".join(process.cmdline())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_marked(sys.argv[1], _ORPHANS_GRACE_S)
