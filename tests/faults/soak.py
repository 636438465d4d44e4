"""Mixed load for a long time, and something that breaks every few seconds.

    python -m tests.faults.soak --minutes 30

Needs no pytest. Exits with 1 if a single answer was wrong, a request failed for another reason than the death
of its router, or something was left behind. The results go to ``soak.json`` in ``--out``, a plot to
``--plot``, a summary into docs/reliability.md with ``--page``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.faults import injections as inject
from tests.faults.cluster import FaultCluster, fault_cluster, in_thread
from tests.faults.configuration import configuration
from tests.faults.load import Fate, Load, Outcome
from tests.faults.memory import MemoryWatch
from tests.faults.processes import WorkerProcesses, send
from tests.faults.record import FOLDER_VARIABLE
from tests.faults.references import References, make_references
from tests.faults.report import PAGE, SOAK_RESULTS, put_between, soak_summary

PERIOD_S = 20.0
CLIENTS = 6
SETTLE_S = 240.0
"""For the last fault to be recovered from."""
ROUTER_AFTERMATH_S = 10.0
"""How long after a router's death HAProxy may still send requests to it."""
MAX_REFUSED_SHARE = 0.01
MAX_GROWTH_MIB, MAX_GROWTH_SHARE = 64.0, 0.2
"""Memory of a long-lived process may be higher in the end by either of these."""
SAMPLE_S = 2.0


@dataclass
class SoakResult:
    """What ``soak.json`` holds. Times are seconds since the start."""

    minutes: float
    clients: int
    period_s: float
    requests: int = 0
    fates: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    """Failed for another reason than the death of a router."""
    cut_by_router: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    """Moments when nothing could be broken without taking a pool's last worker."""
    leaked: int = 0
    orphans: int = 0
    memory_mib: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of long-lived processes, medians of the first and the last tenth."""
    events: list[tuple[float, str]] = field(default_factory=list)
    answers: list[tuple[float, float]] = field(default_factory=list)
    """When each right answer ended, and its time to first token."""
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)


class Soak:
    """One run against a running cluster.

    Args:
        say: called with a line on how it goes, about once a second.
    """

    def __init__(
        self,
        cluster: FaultCluster,
        references: References,
        *,
        minutes: float,
        seed: int = 0,
        clients: int = CLIENTS,
        period_s: float = PERIOD_S,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._cluster = cluster
        self._source = random.Random(seed)
        self._result = SoakResult(minutes=minutes, clients=clients, period_s=period_s)
        self._load = Load(cluster.url, references, clients=clients, seed=f"soak {seed}", pause_s=0.05)
        self._memory = MemoryWatch(cluster)
        self._router_deaths_s: list[float] = []
        self._say = say
        self._began_s = 0.0
        self._pending: set[asyncio.Task[None]] = set()

    async def run(self) -> SoakResult:
        """Breaks things until time is over, waits until all is whole, and judges."""
        result, load = self._result, self._load
        async with load:
            await load.wait_until("the load runs", lambda: len(load.outcomes) >= 2, within_s=60)
            self._began_s = time.monotonic()
            watching = asyncio.create_task(self._watch())
            try:
                while (left_s := result.minutes * 60 - self._now_s()) > 0:
                    await asyncio.sleep(min(result.period_s, left_s))
                    if left_s > result.period_s:
                        await self._break_something()
                await asyncio.gather(*self._pending)
                try:
                    await in_thread(self._cluster.wait_whole, SETTLE_S)
                except AssertionError as error:
                    result.troubles.append(str(error))
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
        leaked = await in_thread(self._cluster.leaked_blocks, 15.0)
        left = await in_thread(self._cluster.orphans, 10.0)
        result.leaked, result.orphans = len(leaked), len(left)
        self._judge([*leaked.values(), *left])
        return result

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    # Breaking.

    async def _break_something(self) -> None:
        """One fault at random; those that would take the last worker of a pool are passed over."""
        choices = [
            (4, self._kill_worker),
            (3, self._kill_engine),
            (3, self._stop_worker),
            (1, self._kill_registry),
            (1, self._kill_planner),
            (1, self._kill_router),
        ]
        while choices:
            ((weight, fault),) = self._source.choices(choices, weights=[each for each, _ in choices])
            try:
                name = await fault()
            except (httpx.HTTPError, psutil.Error):  # it met the end of the fault before
                name = ""
            if name:
                self._result.events.append((round(self._now_s(), 1), name))
                return
            choices.remove((weight, fault))
        self._result.skipped += 1

    async def _victim(self) -> WorkerProcesses | None:
        """A worker that is not the last of its role."""
        workers = await in_thread(self._cluster.workers)
        processes = await in_thread(self._cluster.worker_processes)
        ready = [each for each in workers if each["state"] == "ready" and each["worker_id"] in processes]
        roles = Counter(each["role"] for each in ready)
        able = [each["worker_id"] for each in ready if roles[each["role"]] > 1]
        return processes[self._source.choice(able)] if able else None

    async def _kill_worker(self) -> str:
        victim = await self._victim()
        if victim is None:
            return ""
        inject.kill(victim.replica)
        return f"kill_{victim.role}_worker"

    async def _kill_engine(self) -> str:
        victim = await self._victim()
        if victim is None or victim.engine is None:
            return ""
        inject.kill(victim.engine)
        return f"kill_{victim.role}_engine"

    async def _stop_worker(self) -> str:
        victim = await self._victim()
        if victim is None:
            return ""
        for_s = self._source.uniform(1, 12)
        send(inject.signal.SIGSTOP, *victim.all)

        async def go_on() -> None:
            await asyncio.sleep(for_s)
            send(inject.signal.SIGCONT, *victim.all)

        self._background(go_on())
        return f"stop_{victim.role}_worker"

    async def _kill_registry(self) -> str:
        return await self._kill_single("Registry")

    async def _kill_planner(self) -> str:
        return await self._kill_single("Planner")

    async def _kill_single(self, deployment: str) -> str:
        inject.kill(*await in_thread(self._cluster.replicas, deployment))
        return f"kill_{deployment.lower()}"

    async def _kill_router(self) -> str:
        routers = await in_thread(self._cluster.replicas, "Router")
        if len(routers) < 2 or await in_thread(self._cluster.lacking):
            return ""
        self._router_deaths_s.append(inject.kill(self._source.choice(routers)))
        return "kill_router"

    def _background(self, what: Any) -> None:
        task = asyncio.create_task(what)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    # Watching.

    async def _watch(self) -> None:
        sampled_s = 0.0
        while True:
            await asyncio.sleep(1)
            if self._now_s() - sampled_s > SAMPLE_S:
                sampled_s = self._now_s()
                await in_thread(self._memory.sample, sampled_s)
            fates = Counter(each.fate for each in self._load.outcomes if each.fate)
            last = self._result.events[-1][1] if self._result.events else "nothing yet"
            counts = ", ".join(f"{number} {fate}" for fate, number in sorted(fates.items()))
            self._say(f"{self._now_s() / 60:.1f} of {self._result.minutes:g} min: {counts}; last: {last}")

    def _judge(self, left: list[str]) -> None:
        result, outcomes = self._result, self._load.outcomes
        failed = [each for each in outcomes if each.fate is Fate.FAILED]
        by_router = [each for each in failed if self._router_died_on(each)]
        result.requests = len(outcomes)
        result.fates = {str(fate): number for fate, number in Counter(each.fate for each in outcomes).items()}
        result.cut_by_router, result.failed = len(by_router), len(failed) - len(by_router)
        result.faults = dict(Counter(name for _, name in result.events))
        right = [each for each in outcomes if each.fate is Fate.RIGHT and each.ttft_s is not None]
        result.answers = [
            (round((each.ended_s or 0) - self._began_s, 2), round(each.ttft_s or 0, 3)) for each in right
        ]
        result.memory = self._memory.series
        result.memory_mib = self._memory.tenths()
        result.troubles += left + [
            str(each)
            for each in outcomes
            if each.fate is Fate.WRONG or (each.fate is Fate.FAILED and each not in by_router)
        ]
        if result.fates.get("refused", 0) > MAX_REFUSED_SHARE * len(outcomes):
            refused = [str(each) for each in outcomes if each.fate is Fate.REFUSED]
            result.troubles += [f"{len(refused)} of {len(outcomes)} refused", *refused[:5]]
        for name, (first, last) in result.memory_mib.items():
            if last > max(first + MAX_GROWTH_MIB, first * (1 + MAX_GROWTH_SHARE)):
                result.troubles.append(f"memory of {name} grew from {first:.0f} to {last:.0f} MiB")

    def _router_died_on(self, outcome: Outcome) -> bool:
        """Whether it ended, other than by an error of Baton's own, just after a router died."""
        ended_s = outcome.ended_s or 0
        abrupt = (
            outcome.status in (0, 200, 502, 503, 504) and "error" not in outcome.why.partition("Error")[0]
        )
        return abrupt and any(
            -0.5 < ended_s - died_s < ROUTER_AFTERMATH_S for died_s in self._router_deaths_s
        )


async def soak_here(model_dir: Path, minutes: float, seed: int, say: Callable[[str], None]) -> SoakResult:
    """Starts everything, soaks it, ends everything."""
    from deploy.tiny_model import make_tiny_model

    model = await in_thread(make_tiny_model, model_dir / "tiny")
    say("asking plain vLLM for the right answers")
    references = await in_thread(make_references, model, model_dir)
    say("starting the cluster")
    context = fault_cluster(configuration(model), model_dir)
    cluster = await in_thread(context.__enter__)
    try:
        return await Soak(cluster, references, minutes=minutes, seed=seed, say=say).run()
    finally:
        say("ending the cluster")
        await in_thread(context.__exit__, None, None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get(FOLDER_VARIABLE, "build/faults")))
    parser.add_argument("--plot", type=Path, default=None, help="image to draw")
    parser.add_argument("--page", action="store_true", help="write the summary into docs/reliability.md")
    options = parser.parse_args()
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with tempfile.TemporaryDirectory(prefix="baton-soak-") as folder, Progress(*columns) as progress:
        task = progress.add_task("starting", total=None)
        last_line_s = 0.0

        def say(line: str) -> None:
            nonlocal last_line_s
            progress.update(task, description=line)
            if not progress.console.is_terminal and time.monotonic() - last_line_s > 15:
                last_line_s = time.monotonic()
                print(line, flush=True)

        result = asyncio.run(soak_here(Path(folder), options.minutes, options.seed, say))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / SOAK_RESULTS).write_text(json.dumps(asdict(result)) + "\n")
    summary = soak_summary(asdict(result))
    print(summary)
    if options.plot is not None:
        from tests.faults.soak_plot import plot_soak

        plot_soak(asdict(result), options.plot)
    if options.page:
        PAGE.write_text(put_between(PAGE.read_text(), "soak", summary))
    for trouble in result.troubles[:20]:
        print(f"TROUBLE: {trouble}")
    sys.exit(1 if result.troubles else 0)


if __name__ == "__main__":
    main()
