"""How far the simulator is from a real cluster: two prefill and two decode engines, paced, on this machine.

The engines are real in everything but speed: each step is padded to what a slow accelerator would take,
at least ``PACE_FACTOR`` times the step's own CPU time, so that four engines do not slow each other on a
small machine. The profile is measured on the running cluster. What no profile holds is fitted on one
trace: the front end's time, from the median TTFT, and the time from a handoff to its pull, from the
median TPOT. Another, bursty trace is the judge.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.answers import Answer
from benchmarks.load import LoadGenerator
from benchmarks.model import NAME
from benchmarks.table import Table
from core.performance_profile import PerformanceProfile
from simulator.reports.summary import slo_met
from simulator.result import SimulationResult, Slo
from simulator.scenario import static_cluster
from simulator.simulation import simulate
from simulator.traces.generator_text import workload_from_text
from simulator.traces.generators import generate
from simulator.traces.trace import Trace

PACE_FACTOR = 4.0
PACE = {
    "baton_pace_factor": PACE_FACTOR,
    "baton_pace_prefill_base_ms": 60.0,
    "baton_pace_prefill_ms_per_token": 0.5,
    "baton_pace_decode_base_ms": 60.0,
    "baton_pace_decode_ms_per_seq": 2.0,
    "baton_pace_decode_ms_per_kv_token": 0.002,
}
ROUTER = {"policy": "least_load", "admission": {"enabled": False}}
"""As the simulation runs: every request is sent at once, by load alone."""
SLO = Slo(ttft_s=0.75, tpot_s=0.085)
FIT = "poisson:rate=3.6,prompt=500~1400,output=30~90,duration={seconds}"
JUDGE = "bursts:rate=3.2,cv=2.5,prompt=500~1400,output=30~90,duration={seconds}"
SECONDS, QUICK_SECONDS = 150, 30
VOCABULARY = range(10, 2000)
MAX_HANDOFF_S = 0.5
_BISECTIONS = 8
TARGET_ERROR = 0.15
TARGET_ATTAINMENT_POINTS = 5.0


def shape() -> dict[str, Any]:
    """Two prefill and two decode workers on paced engines."""
    return {
        "count": 4,
        "initial": {"prefill": 2, "decode": 2},
        "engine_args": {
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_model_len": 4096,
            "max_num_batched_tokens": 1024,
            "max_num_seqs": 64,
            "kv_cache_memory_bytes": 96 << 20,
            "worker_cls": "engine.paced_worker.PacedCPUWorker",
            "additional_config": PACE,
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What is compared."""

    ttft_p50_ms: float
    ttft_p90_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    attainment: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One trace on the real cluster."""

    figures: Figures
    cpu_share: float
    """Of the machine's cores, mean over the replay, load generator included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What no profile holds."""

    router_s: float = 0.0
    handoff_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Both traces, real and simulated."""

    overheads: Overheads
    """Fitted on the first trace."""
    num_requests: Mapping[str, int]
    real: Mapping[str, Replay]
    simulated: Mapping[str, Figures]


def measure(
    load: LoadGenerator,
    url: str,
    port: int,
    profile: Callable[[], PerformanceProfile],
    seconds: int,
    progress: Callable[[str], None],
) -> Fidelity:
    """Profiles the running cluster, replays both traces, simulates both."""
    progress("profiling a prefill and a decode worker")
    measured = profile()
    traces = {
        "fit": generate(workload_from_text(FIT.format(seconds=seconds)), 11),
        "judge": generate(workload_from_text(JUDGE.format(seconds=seconds)), 12),
    }
    real: dict[str, Replay] = {}
    for name, trace in traces.items():
        progress(f"replaying {trace.name} ({len(trace.requests)} requests)")
        real[name] = replay(load, url, port, trace)
    overheads = fit(measured, traces["fit"], real["fit"].figures)
    simulated = {name: figures_of(run(measured, trace, overheads)) for name, trace in traces.items()}
    return Fidelity(
        overheads=overheads,
        num_requests={name: len(trace.requests) for name, trace in traces.items()},
        real=real,
        simulated=simulated,
    )


def replay(load: LoadGenerator, url: str, port: int, trace: Trace) -> Replay:
    """Sends the trace to the cluster once it is idle."""
    _wait_idle(url)
    source = random.Random(trace.name)
    bodies = [
        {
            "model": NAME,
            "prompt": source.choices(VOCABULARY, k=request.prompt_tokens),
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for request in trace.requests
    ]
    psutil.cpu_percent()
    answers = load.replay(
        port, bodies, [request.arrival_s for request in trace.requests], path="/v1/completions"
    )
    cpu_share = psutil.cpu_percent() / 100
    return Replay(figures=_figures_of_answers(answers), cpu_share=cpu_share)


def run(profile: PerformanceProfile, trace: Trace, overheads: Overheads) -> SimulationResult:
    """The same trace on the simulated cluster."""
    cluster = static_cluster(
        trace, prefill=profile, num_prefill=2, decode=profile, num_decode=2, **asdict(overheads)
    )
    return simulate(trace, cluster, seed=1)


def fit(profile: PerformanceProfile, trace: Trace, real: Figures) -> Overheads:
    """Overheads for which the simulated medians of TTFT and TPOT are the real ones."""
    without_ms = figures_of(run(profile, trace, Overheads())).ttft_p50_ms
    router_s = max(0.0, (real.ttft_p50_ms - without_ms) / 1e3)
    low_s, high_s = 0.0, MAX_HANDOFF_S
    for _ in range(_BISECTIONS):
        handoff_s = (low_s + high_s) / 2
        overheads = Overheads(router_s=router_s, handoff_s=handoff_s)
        if figures_of(run(profile, trace, overheads)).tpot_p50_ms < real.tpot_p50_ms:
            low_s = handoff_s
        else:
            high_s = handoff_s
    return Overheads(router_s=router_s, handoff_s=low_s)


def figures_of(result: SimulationResult) -> Figures:
    requests = result.requests
    ttft_met, tpot_met = slo_met(requests, SLO)
    return _figures(requests.ttft_s, requests.tpot_s, ttft_met & tpot_met)


def _figures_of_answers(answers: Sequence[Answer]) -> Figures:
    ttft_s = np.array([answer.ttft_s for answer in answers])
    tpot_s = np.array([answer.tpot_s if answer.output_tokens > 1 else np.nan for answer in answers])
    met = (ttft_s <= SLO.ttft_s) & (np.isnan(tpot_s) | (tpot_s <= SLO.tpot_s))
    return _figures(ttft_s, tpot_s, met)


def _figures(ttft_s: Any, tpot_s: Any, met: Any) -> Figures:
    ttft_p50, ttft_p90 = np.nanpercentile(ttft_s, [50, 90]) * 1e3
    tpot_p50, tpot_p90 = np.nanpercentile(tpot_s, [50, 90]) * 1e3
    return Figures(
        ttft_p50_ms=float(ttft_p50),
        ttft_p90_ms=float(ttft_p90),
        tpot_p50_ms=float(tpot_p50),
        tpot_p90_ms=float(tpot_p90),
        attainment=float(np.mean(met)),
    )


def _wait_idle(url: str, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        workers = httpx.get(f"{url}/baton/status", timeout=5).json()["workers"]
        if not any(worker["num_requests"] or worker["num_pinned"] for worker in workers):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the cluster was not idle within {timeout_s:.0f} s")


def tables(fidelity: Fidelity) -> list[Table]:
    """Real and simulated, side by side."""
    overheads = fidelity.overheads
    fitted = [
        ("front end, a request", f"{1e3 * overheads.router_s:.0f}"),
        ("from a handoff to its pull", f"{1e3 * overheads.handoff_s:.0f}"),
    ]
    result = [Table("Fitted overheads", ["", "ms"], fitted)]
    for name, what in (("fit", "Poisson arrivals, fitted on"), ("judge", "bursty arrivals, judged on")):
        real, simulated = fidelity.real[name], fidelity.simulated[name]
        rows = []
        for key in ("ttft_p50_ms", "ttft_p90_ms", "tpot_p50_ms", "tpot_p90_ms"):
            ours, theirs = getattr(simulated, key), getattr(real.figures, key)
            measure, percent, _ = key.split("_")
            rows.append(
                (
                    f"{measure.upper()} {percent} (ms)",
                    f"{theirs:.1f}",
                    f"{ours:.1f}",
                    f"{ours / theirs - 1:+.1%}",
                )
            )
        points = 100 * (simulated.attainment - real.figures.attainment)
        rows.append(
            (
                "attainment",
                f"{real.figures.attainment:.1%}",
                f"{simulated.attainment:.1%}",
                f"{points:+.1f} points",
            )
        )
        title = f"{what}: {fidelity.num_requests[name]} requests, CPU {real.cpu_share:.0%} of the machine"
        result.append(Table(title, ["", "real", "simulated", "difference"], rows))
    return result


def as_json(fidelity: Fidelity) -> dict[str, Any]:
    return asdict(fidelity)


def within_targets(fidelity: Fidelity, name: str = "judge") -> bool:
    """Whether a trace's figures differ by no more than the targets."""
    real, simulated = fidelity.real[name].figures, fidelity.simulated[name]
    pairs = [
        (getattr(simulated, key), getattr(real, key))
        for key in ("ttft_p50_ms", "ttft_p90_ms", "tpot_p50_ms", "tpot_p90_ms")
    ]
    close = all(abs(ours / theirs - 1) <= TARGET_ERROR for ours, theirs in pairs)
    return close and 100 * abs(simulated.attainment - real.attainment) <= TARGET_ATTAINMENT_POINTS
