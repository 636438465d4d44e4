"""The running cluster as those see it who break it: workers, processes, and whether it is whole again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.faults.cluster_process import ANSWER
from tests.faults.configuration import (
    MODEL,
    NUM_DECODE,
    NUM_PREFILL,
    NUM_ROUTERS,
    START_TIMEOUT_S,
)
from tests.faults.processes import WorkerProcesses, describe, orphans, titled, worker_processes
from tests.integration.served import ServedByBaton
from tests.integration.server_process import HOST, ServerProcess

_LOG_BYTES = 1 << 24
SINGLES = {"Registry": 1, "Planner": 1, "Router": NUM_ROUTERS}
"""Replicas of each deployment that is not one of workers."""


class FaultCluster(ServedByBaton):
    """A cluster in a process of its own; see ``cluster_process``."""

    process: ServerProcess
    config: dict[str, Any]
    mark = ""
    log_dir: Path
    """Ray's logs of every process."""
    split = (NUM_PREFILL, NUM_DECODE)
    """How many workers of each role it has when it is whole."""
    _num_answers = 0

    # Its processes.

    def worker_processes(self) -> dict[str, WorkerProcesses]:
        return worker_processes(self.processes(), self.workers())

    def of(self, role: str) -> list[WorkerProcesses]:
        return [each for each in self.worker_processes().values() if each.role == role]

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Living processes of one deployment's replicas."""
        return titled(titled(self.processes(), "ServeReplica"), f":{deployment}")

    def named(self, title: str) -> list[psutil.Process]:
        return titled(self.processes(), title)

    def processes(self) -> list[psutil.Process]:
        """Every living process of the cluster; some may end meanwhile."""
        found = []
        for child in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
        return found

    def orphans(self, within_s: float = 5.0) -> list[str]:
        """Processes that nobody is the parent of any more, and that have not ended after ``within_s``."""
        deadline_s = time.monotonic() + within_s
        while (left := orphans(self.pid, self.mark)) and time.monotonic() < deadline_s:
            time.sleep(0.2)
        return [describe(process) for process in left]

    # Its state.

    def lacking(self) -> str:
        """What it lacks to be whole; empty if it is. Two looks, as there are two routers to ask.

        Processes show at once who died, Ray Serve who has not started yet.
        """
        for _ in range(2):
            try:
                workers = self.workers()
            except (httpx.HTTPError, KeyError) as error:
                return f"no status: {error!r}"
            roles = Counter(worker["role"] for worker in workers if worker["state"] == "ready")
            if len(workers) != sum(self.split) or (roles["prefill"], roles["decode"]) != self.split:
                return f"workers: {[(each['worker_id'], each['role'], each['state']) for each in workers]}"
        for name, number in SINGLES.items():
            if (found := len(self.replicas(name))) != number:
                return f"{found} replicas of {name}, not {number}"
        processes = self.worker_processes()
        gone = [each["worker_id"] for each in workers if each["worker_id"] not in processes]
        gone += [worker_id for worker_id, each in processes.items() if each.engine is None]
        return f"no processes of {gone}" if gone else str(self.say("unready", timeout_s=60))

    def wait_whole(self, within_s: float = START_TIMEOUT_S) -> None:
        """Until every worker has its role, every router sees them all and every replica is there.

        Raises:
            AssertionError: something was still missing after ``within_s``.
        """
        deadline_s = time.monotonic() + within_s
        while lacking := self.lacking():
            assert time.monotonic() < deadline_s, f"not whole after {within_s:g} s: {lacking}"
            time.sleep(0.25)

    def leaked_blocks(self, within_s: float) -> dict[str, str]:
        """KV blocks and requests that workers of an idle cluster still hold after ``within_s``."""
        deadline_s = time.monotonic() + within_s
        while True:
            try:
                busy = self.busy_workers()
            except (httpx.HTTPError, AssertionError) as error:
                busy = [f"unknown: {error!r}"]
            if not busy or time.monotonic() > deadline_s:
                return {line.partition(":")[0]: line for line in busy}
            time.sleep(0.1)

    def counter(self, name: str, **labels: str) -> float:
        """Sum of a counter's series with these labels over all processes."""
        total = 0.0
        for group in self.get("/baton/prometheus-sd"):
            for target in group["targets"]:
                with contextlib.suppress(httpx.HTTPError):
                    for line in httpx.get(f"http://{target}/metrics", timeout=5).text.splitlines():
                        if line.startswith(f"{name}{{") and all(
                            f'{k}="{v}"' in line for k, v in labels.items()
                        ):
                            total += float(line.rpartition(" ")[2])
        return total

    def num_queued(self) -> float:
        """Requests that wait in the routers."""
        total = 0.0
        for group in self.get("/baton/prometheus-sd"):
            if group["labels"]["process"] == "router":
                for target in group["targets"]:
                    with contextlib.suppress(httpx.HTTPError):  # listed for a while after its death
                        text = httpx.get(f"http://{target}/metrics", timeout=5).text
                        found = re.search(r"^baton_queued_requests (.*)$", text, re.MULTILINE)
                        total += float(found.group(1)) if found else 0.0
        return total

    # What it is told.

    def say(self, line: str, timeout_s: float = 20.0) -> Any:
        """Sends a line to the cluster's process; returns its answer, empty where all is well."""
        self.process.send_line(line)
        return self.answer(timeout_s)

    def answer(self, timeout_s: float) -> Any:
        self._num_answers += 1
        self.process.wait_until(lambda: len(self._answers()) >= self._num_answers, timeout_s)
        return json.loads(self._answers()[-1])

    def _answers(self) -> list[str]:
        lines = self.process.log_tail(_LOG_BYTES).split("\n")[:-1]
        return [line.removeprefix(ANSWER) for line in lines if line.startswith(ANSWER)]

    def apply(self, change: Callable[[dict[str, Any]], None], timeout_s: float = START_TIMEOUT_S) -> None:
        """Changes the configuration of the running cluster."""
        change(self.config)
        path = Path(self.log_dir.parent) / f"faults-{time.monotonic_ns()}.yaml"
        path.write_text(json.dumps(self.config))
        assert self.say(f"apply {path}", timeout_s) == ""

    def assign(self, roles: dict[str, str]) -> None:
        assert self.say(f"roles {json.dumps(roles)}") == ""


@contextlib.contextmanager
def fault_cluster(config: dict[str, Any], run_dir: Path) -> Iterator[FaultCluster]:
    """A cluster that ends with the context, and everything it started with it."""
    path = run_dir / "cluster.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "tests.faults.cluster_process", str(path)]
    process = ServerProcess("the cluster", command, {"HF_HUB_OFFLINE": "1"}, run_dir / "cluster.log")
    try:
        cluster = FaultCluster(f"http://{HOST}:{config['router']['port']}", MODEL, pid=process.pid)
        cluster.process, cluster.config = process, config
        about = cluster.answer(START_TIMEOUT_S)
        cluster.mark, cluster.log_dir = about["mark"], Path(about["logs"])
        cluster.wait_whole()
        yield cluster
        cluster.close()
    finally:
        process.stop(grace_s=60)


async def in_thread(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Keeps a look at processes out of the way of the load."""
    return await asyncio.to_thread(call, *args, **named)
