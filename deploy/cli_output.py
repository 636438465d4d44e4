"""What the baton command prints: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as LiveProgress

from core.errors import BatonError, ConfigError
from deploy.progress import Progress
from deploy.ray_errors import essence

_PLAIN_WIDTH = 120
"""Columns where nobody says how wide the output is: a pipe or a file."""


def output() -> Console:
    """For what the user asked for."""
    return _console(stderr=False)


def messages() -> Console:
    """For everything else."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    return console


def report(error: Exception) -> int:
    """Prints an error as one message.

    Returns:
        The exit status that goes with it: 2 if the user has to change the configuration or the command
        line, else 1.

    Raises:
        Exception: the error itself, if the user wants tracebacks.
    """
    if os.environ.get("BATON_LOG_LEVEL", "").upper() == "DEBUG":
        raise error
    console = messages()
    console.print("error: ", style="bold red", end="")
    console.print(error_text(error), markup=False, soft_wrap=True)
    return exit_code(error)


def error_text(error: Exception) -> str:
    """The error and its notes; of an unexpected one, its essence and how to see more."""
    notes = getattr(error, "__notes__", [])
    if isinstance(error, BatonError):
        return "\n".join([str(error), *notes])
    what = essence(f"{type(error).__name__}: {error}")
    return "\n".join([what, *notes, "BATON_LOG_LEVEL=DEBUG shows where it happened"])


def exit_code(error: Exception) -> int:
    return 2 if isinstance(error, ConfigError) else 1


@contextlib.contextmanager
def phase_lines() -> Iterator[Progress]:
    """Prints a line as each phase begins, with the seconds so far; on a terminal the last one ticks."""
    console = messages()
    started_s = time.monotonic()
    if not console.is_terminal:
        yield lambda phase: console.print(f"{time.monotonic() - started_s:6.1f} s  {phase}", markup=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with LiveProgress(*columns, console=console, transient=True) as live:
        task = live.add_task("", total=None)

        def begin(phase: str) -> None:
            live.console.print(f"{time.monotonic() - started_s:6.1f} s  {phase}", markup=False)
            live.update(task, description=phase)

        yield begin


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal; yields what takes (done, total)."""
    console = messages()
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with LiveProgress(*columns, console=console, transient=True) as live:
        task = live.add_task(what, total=total)
        yield lambda done, total: live.update(task, completed=done, total=total)
