"""Clusters in the background: ``baton serve --detach`` starts one, ``baton stop`` ends it.

The cluster is an ordinary ``baton serve`` in a session of its own. It reports over a pipe while it
starts, one JSON object a line, so that whoever started it can show its progress and its one error:

    {"phase": "starting Ray"} ... {"ready": {"mark": ...}}  or  {"error": "...", "exit_code": 2}

What is known of it lies in ``<state directory>/<port>/run.json``. A process is taken for the recorded
one only if it was started at the recorded clock tick: process ids are used again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil

from core.errors import ConfigError, StartupError
from deploy.cluster import service_url
from deploy.config_schema import BatonConfig
from deploy.processes import MARK, end_marked
from deploy.progress import Progress
from deploy.settings import shutdown_limit_s

EXIT_CONFIG = 2
_STOP_SLACK_S = 20.0
_KILL_AFTER_S = 10.0
_LOG_TAIL_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachedRun:
    """One background cluster."""

    port: int
    pid: int
    start_ticks: int
    """When the process started, in clock ticks since boot."""
    url: str
    config: str
    log: str
    stop_timeout_s: float
    """What a clean stop may take."""
    mark: str | None = None
    """See :class:`deploy.processes.ProcessGuard`; known once it is ready."""

    @property
    def alive(self) -> bool:
        return _start_ticks(self.pid) == self.start_ticks


class Reporter:
    """The background side of the pipe."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._pipe = os.fdopen(fd, "w", buffering=1)

    def phase(self, phase: str) -> None:
        self._send({"phase": phase})

    def ready(self, mark: str | None) -> None:
        self._send({"ready": {"mark": mark}})
        with contextlib.suppress(OSError):
            self._pipe.close()

    def failed(self, message: str, exit_code: int) -> None:
        self._send({"error": message, "exit_code": exit_code})

    def _send(self, message: dict[str, Any]) -> None:
        # Nobody listens any more: the cluster lives on all the same.
        with contextlib.suppress(OSError, ValueError):
            self._pipe.write(json.dumps(message) + "\n")


def start(config_path: Path, config: BatonConfig, progress: Progress) -> DetachedRun:
    """Starts a cluster in the background and waits until it is ready.

    Raises:
        ConfigError: as in :meth:`deploy.cluster.Cluster.start`.
        StartupError: it failed, or one runs on this port already.
    """
    port = config.router.port
    known = find(port)
    if known is not None and known.alive:
        raise StartupError(f"a cluster runs at {known.url} already (process {known.pid}): baton stop {port}")
    folder = state_dir() / str(port)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / "serve.log"
    reading, writing = os.pipe()
    # -P: a folder called deploy or core where the user happens to be is not ours.
    command = [sys.executable, "-P", "-m", "deploy.cli", "serve", str(config_path)]
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            [*command, "--report-fd", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,
        )
    os.close(writing)
    run = DetachedRun(
        port=port,
        pid=process.pid,
        start_ticks=_start_ticks(process.pid) or 0,
        url=service_url(config),
        config=str(config_path),
        log=str(log),
        stop_timeout_s=shutdown_limit_s(config) + _STOP_SLACK_S,
    )
    _write(run)
    try:
        with os.fdopen(reading) as pipe:
            mark = _follow(pipe, process, log, progress)
    except (ConfigError, StartupError):
        process.wait(run.stop_timeout_s)
        _forget(run)
        raise
    except KeyboardInterrupt:
        stop(run)
        raise
    run = replace(run, mark=mark)
    _write(run)
    return run


def stop(run: DetachedRun) -> bool:
    """Ends a background cluster: asks it to, then insists, then kills every process of it.

    Returns:
        False if it had ended by itself; what it may have left behind is ended now.
    """
    was_alive = run.alive
    marks = {run.mark} if run.mark else set()
    if was_alive:
        process = psutil.Process(run.pid)
        marks |= _marks_below(process)
        for number, patience_s in (
            (signal.SIGTERM, run.stop_timeout_s),
            (signal.SIGTERM, _KILL_AFTER_S),
            (signal.SIGKILL, _KILL_AFTER_S),
        ):
            try:
                process.send_signal(number)
                process.wait(patience_s)
                break
            except psutil.NoSuchProcess:
                break
            except psutil.TimeoutExpired:
                continue
    for mark in marks:
        end_marked(mark, grace_s=2.0)
    _forget(run)
    return was_alive


def state_dir() -> Path:
    """Where background clusters are remembered, by port."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "baton"


def find(port: int) -> DetachedRun | None:
    """The cluster started on a port, whether or not it still lives."""
    try:
        return DetachedRun(**json.loads((state_dir() / str(port) / "run.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def find_all() -> list[DetachedRun]:
    """All clusters that were started and not stopped, whether or not they still live."""
    ports = sorted(int(path.name) for path in state_dir().glob("*") if path.name.isdigit())
    return [run for port in ports if (run := find(port))]


def _follow(pipe: IO[str], process: subprocess.Popen[bytes], log: Path, progress: Progress) -> str | None:
    for message in _messages(pipe):
        if "phase" in message:
            progress(message["phase"])
        elif "ready" in message:
            return message["ready"]["mark"]
        elif "error" in message:
            error = ConfigError if message["exit_code"] == EXIT_CONFIG else StartupError
            raise error(message["error"])
    exit_code = process.wait(_KILL_AFTER_S)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
    raise StartupError(f"it ended while starting, exit status {exit_code}; the end of {log}:\n{tail}")


def _messages(pipe: IO[str]) -> Iterator[dict[str, Any]]:
    for line in pipe:
        yield json.loads(line)


def _write(run: DetachedRun) -> None:
    path = state_dir() / str(run.port) / "run.json"
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(run), indent=1))
    scratch.replace(path)


def _forget(run: DetachedRun) -> None:
    """The log stays: it may be needed just now."""
    (state_dir() / str(run.port) / "run.json").unlink(missing_ok=True)


def _start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None if there is no such process or only its zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _marks_below(process: psutil.Process) -> set[str]:
    marks = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                marks.add(child.environ().get(MARK))
    return {mark for mark in marks if mark}
