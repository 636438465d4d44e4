"""Rules for every test run: a signal ends it cleanly, and no process outlives it."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Generator, Iterator

import psutil
import pytest
from hypothesis import settings

from tests.faults import record
from tests.faults.record import FaultReport

_MARK = "BATON_TEST_RUN"
_GRACE_S = float(os.environ.get("BATON_TEST_GRACE_S", "10"))
_leaked = pytest.StashKey[list[str]]()

# How long an example takes says how busy the machine is. All else is as Hypothesis has it, in CI too.
settings.register_profile("no-deadline", settings.default, deadline=None)
settings.load_profile("no-deadline")


def pytest_configure(config: pytest.Config) -> None:
    """Marks this run's environment, which every process started by a test inherits."""
    record.configure(config)
    os.environ[_MARK] = uuid.uuid4().hex
    os.environ["SPT_NOENV"] = "1"  # setproctitle would write over the mark in /proc
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # fixtures are torn down, as after Ctrl-C


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    record.note_outcome(item, report)
    return report


@pytest.fixture
def fault_report(request: pytest.FixtureRequest) -> FaultReport:
    """Where a test of the fault matrix notes what it measured."""
    return FaultReport(request.node)


@pytest.hookimpl(trylast=True)  # after the teardown of session fixtures
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fails the run if a process it started is left, and ends that process."""
    record.write_results(session.config)
    deadline = time.monotonic() + _GRACE_S
    while (left := list(_processes_of_this_run())) and time.monotonic() < deadline:
        time.sleep(0.1)
    session.config.stash[_leaked] = [_describe(process) for process in left]
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if (cache := getattr(session.config, "cache", None)) is not None:
        # Whether the tests that failed are all that there is to say against this run.
        came_to_its_end = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        cache.set("baton/whole", came_to_its_end and not left)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_leaked, []):
        terminalreporter.write_line(f"LEAKED PROCESS (now killed): {line}", red=True)


def _processes_of_this_run() -> Iterator[psutil.Process]:
    """Living processes that carry the mark, wherever they hang in the process tree, and all descendants."""
    descendants = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process not in descendants and process.environ().get(_MARK) != os.environ[_MARK]:
                continue
            # The standard library's own helper ends when its parent, this process, does.
            if process.ppid() == os.getpid() and "multiprocessing.resource_tracker" in _describe(process):
                continue
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        yield process


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return f"{process.pid} (gone)"
