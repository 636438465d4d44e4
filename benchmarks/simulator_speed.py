"""What a simulation costs: seconds by requests and by workers, at one load a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import Table
from simulator.profiles.files import find_profile
from simulator.scenario import static_cluster
from simulator.simulation import simulate
from simulator.traces.generator_text import workload_from_text
from simulator.traces.generators import generate

PROFILE = "h200-llama-3.1-8b-fp8-tp1"
RPS_PER_WORKER = 0.7
LOAD = "poisson:rate={rate},prompt=1155~4142,output=211~600,duration={seconds}"
"""Lengths as in Azure's conversation trace."""
CASES = ((3_000, 64), (10_000, 64), (20_000, 64), (30_000, 64), (40_000, 64), (30_000, 8), (30_000, 1000))
_RUNS = 2
QUICK_CASES = ((3_000, 64), (30_000, 64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    num_requests: int
    num_workers: int
    cpu_s: float
    """Of the one process, all of it: one core. The less disturbed of two runs."""
    simulated_s: float


def measure(cases: Sequence[tuple[int, int]], progress: Callable[[str], None]) -> list[Cost]:
    profile = find_profile(PROFILE)
    costs = []
    for num_requests, num_workers in cases:
        progress(f"{num_requests:,} requests on {num_workers} workers")
        rate = RPS_PER_WORKER * num_workers
        trace = generate(workload_from_text(LOAD.format(rate=rate, seconds=num_requests / rate)), 1)
        half = num_workers // 2
        cluster = static_cluster(trace, prefill=profile, num_prefill=half, decode=profile, num_decode=half)
        cpu_s = []
        for _ in range(_RUNS):
            started_s = time.process_time()
            result = simulate(trace, cluster)
            cpu_s.append(time.process_time() - started_s)
        costs.append(
            Cost(
                num_requests=len(trace.requests),
                num_workers=num_workers,
                cpu_s=min(cpu_s),
                simulated_s=result.simulated_s,
            )
        )
    return costs


def tables(costs: Sequence[Cost]) -> list[Table]:
    rows = [
        (
            f"{cost.num_requests:,}",
            str(cost.num_workers),
            f"{cost.cpu_s:.1f}",
            f"{1e6 * cost.cpu_s / cost.num_requests:.0f}",
            f"{cost.simulated_s / cost.cpu_s:,.0f}",
        )
        for cost in costs
    ]
    headers = ["requests", "workers", "CPU seconds", "µs a request", "times real time"]
    return [Table("Cost of a simulation, one core", headers, rows)]


def plot(costs: Sequence[Cost], path: Path) -> None:
    """Seconds by requests, at one number of workers."""
    from matplotlib.figure import Figure

    line = sorted((cost.num_requests, cost.cpu_s) for cost in costs if cost.num_workers == 64)
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*line, strict=True), "o-", color="#0072b2")
    axes.set(xlabel="requests", ylabel="CPU seconds", title="Simulating 64 workers")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def as_json(costs: Sequence[Cost]) -> dict[str, Any]:
    return {f"{cost.num_requests} x {cost.num_workers}": asdict(cost) for cost in costs}
