"""What the fault benchmark needs to know of a system, and what it does to its processes."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import psutil

from benchmarks.fault_settings import NUM_DECODE, NUM_KV_BLOCKS, NUM_PREFILL

PREFILL, DECODE = "prefill", "decode"
_PR_SET_PDEATHSIG = 1
SPLIT = {PREFILL: NUM_PREFILL, DECODE: NUM_DECODE}


@dataclass(frozen=True, slots=True)
class Worker:
    """One engine with the process that answers for it."""

    name: str
    role: str
    process: psutil.Process

    @property
    def engine_processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.process.children(recursive=True)
        return []


@dataclass(frozen=True, slots=True)
class Held:
    """What a worker holds: KV blocks, and requests that run or wait."""

    kv_blocks: int
    requests: int

    def __bool__(self) -> bool:
        return bool(self.kv_blocks or self.requests)


class System(Protocol):
    """A running system of two prefill and two decode workers; a context manager starts and ends it."""

    name: str
    url: str

    def workers(self) -> list[Worker]:
        """Those that are alive and ready to serve, as far as the system says."""

    def held(self) -> Mapping[str, Held]:
        """By worker name."""

    def restart(self, victims: Sequence[Worker]) -> None:
        """Starts workers in place of dead ones, where the system leaves that to others."""

    restarts_itself: bool


def wait_whole(system: System, within_s: float) -> bool:
    """Until it has all its workers; False if it had not in time."""
    deadline_s = time.monotonic() + within_s
    while not is_whole(system):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.25)
    return True


def is_whole(system: System) -> bool:
    try:
        roles = [worker.role for worker in system.workers()]
    except (httpx.HTTPError, psutil.Error, KeyError, ValueError):
        return False
    return all(roles.count(role) == count for role, count in SPLIT.items())


def busiest(system: System, role: str) -> Worker:
    """The worker of a role with the most requests, as far as its metrics say."""
    held = system.held()
    workers = [worker for worker in system.workers() if worker.role == role]
    return max(workers, key=lambda worker: held[worker.name].requests if worker.name in held else 0)


def kill(workers: Iterable[Worker]) -> float:
    """SIGKILL to whole workers, the process and its engine; returns when."""
    doomed = [process for worker in workers for process in (worker.process, *worker.engine_processes)]
    at_s = time.monotonic()
    send(signal.SIGKILL, doomed)
    return at_s


@contextlib.contextmanager
def stopped_engines(workers: Iterable[Worker]) -> Iterator[None]:
    """Engines do nothing inside; the processes that answer for them do."""
    engines = [process for worker in workers for process in worker.engine_processes]
    send(signal.SIGSTOP, engines)
    try:
        yield
    finally:
        send(signal.SIGCONT, engines)


def send(number: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    """Signals processes; one that is gone is not missed."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def end(process: subprocess.Popen[bytes], grace_s: float, how: Callable[[], None] | None = None) -> None:
    """Ends a process and everything it has started: by its own means first, by SIGKILL what is left."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    (how or process.terminate)()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with contextlib.suppress(psutil.NoSuchProcess):
        family += psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    left = [each for each in family if each.is_running()]
    send(signal.SIGKILL, left)
    psutil.wait_procs(left, timeout=5)


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process with its output in a file, in a session of its own; told to end when this one does."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=Path(__file__).parent.parent,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_ready(
    name: str, process: subprocess.Popen[bytes], ready: Callable[[], bool], timeout_s: float
) -> None:
    """
    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode} while starting")
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{name} was not ready in {timeout_s:.0f} s")
        time.sleep(0.25)


def answers(url: str) -> bool:
    """Whether something serves ``url`` with status 200."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2.0).status_code == 200
    return False


def vllm_held(metrics: str) -> Held:
    """From the metrics of one vLLM server."""

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE)))

    return Held(
        kv_blocks=round(total("vllm:kv_cache_usage_perc") * (NUM_KV_BLOCKS - 1)),  # one block is never used
        requests=round(total("vllm:num_requests_running") + total("vllm:num_requests_waiting")),
    )
