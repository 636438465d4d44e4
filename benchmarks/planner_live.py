"""The planner in charge of real, paced engines under a load that turns to long answers and back.

Every answer is compared with one plain engine's; the same load on the same cluster is simulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil

from benchmarks.planner_live_load import PATH, Load, Outcome, Question, Replayed, make_load, replay
from benchmarks.planner_live_setup import (
    LONG_ANSWERS,
    LONG_PROMPTS,
    SLO,
    engine_args,
    live_config,
    paced_profile,
    simulated_cluster,
)
from benchmarks.planner_live_switches import Switch, switches
from benchmarks.servers import PlainVllm
from benchmarks.table import Table
from deploy.cluster import Cluster
from planner.decision import Verdict
from router.policies import make_policy
from router.routing import RoutingPolicy
from simulator.profiles.files import write_profile
from simulator.reports.summary import slo_met
from simulator.result import SimulationResult
from simulator.simulation import simulate

Floats = npt.NDArray[np.float64]

SEED = 3
QUICK_SECONDS = 20.0
_ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The requests of one phase, or all."""

    name: str
    num_requests: int
    attainment: float
    ttft_s: tuple[float, float]
    """p50 and p90."""
    tpot_s: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LiveRun:
    """The load on real engines, and its simulation."""

    load: Load
    replayed: Replayed
    switches: tuple[Switch, ...]
    num_failed: int
    num_wrong: int
    """Answers that are not the plain engine's."""
    cpu_share: float
    """Of the machine, mean over the load, load generator included."""
    simulated: SimulationResult
    static: SimulationResult
    """Simulated without the planner."""


def measure(model_dir: Path, cache: Path, quick: bool, progress: Callable[[str], None]) -> LiveRun:
    """Starts the cluster, sends the load, ends the cluster, asks a plain engine, simulates."""
    phases = [LONG_PROMPTS, LONG_ANSWERS, LONG_PROMPTS]
    if quick:
        phases = [replace(phase, seconds=QUICK_SECONDS) for phase in phases]
    load = make_load(phases, SEED)
    profile = paced_profile()
    profile_path = cache / "planner-live-profile.json"
    write_profile(profile, profile_path)
    config = live_config(model_dir, profile_path)
    with Cluster(config, progress) as cluster:
        progress(f"{len(load.questions)} requests in {load.seconds:.0f} s")
        psutil.cpu_percent()
        replayed = replay(cluster.url, load)
        cpu_share = psutil.cpu_percent() / 100
        offset_s = time.monotonic() - time.time()
        moves = httpx.get(f"{cluster.url}/baton/planner?moves=true&last=1000").raise_for_status().json()
    progress("asking a plain engine")
    with PlainVllm(model_dir, config, engine_args()) as plain:
        expected = plain_answers(f"http://127.0.0.1:{plain.port}", load.questions)
    progress("simulating")
    spec = simulated_cluster(config, profile, load.trace())
    traces = [outcome.trace for outcome in replayed.outcomes if outcome.trace]
    return LiveRun(
        load=load,
        replayed=replayed,
        switches=tuple(switches(moves["decisions"], traces, offset_s)),
        num_failed=sum(bool(outcome.error) for outcome in replayed.outcomes),
        num_wrong=num_wrong(load.questions, replayed.outcomes, expected),
        cpu_share=cpu_share,
        simulated=simulate(load.trace(), spec, make_policy=_policy, seed=SEED),
        static=simulate(load.trace(), replace(spec, planner=None), make_policy=_policy, seed=SEED),
    )


def _policy(seed: int) -> RoutingPolicy:
    return make_policy("predictive", seed)


def plain_answers(url: str, questions: Sequence[Question]) -> dict[Question, str]:
    """What a server answers to each question, asked one after another."""
    answers = {}
    with httpx.Client(base_url=url, timeout=_ANSWER_TIMEOUT_S) as client:
        for question in sorted(set(questions), key=lambda question: question.prompt):
            answer = client.post(PATH, json=question.body()).raise_for_status().json()
            answers[question] = str(answer["choices"][0]["text"])
    return answers


def num_wrong(
    questions: Sequence[Question], outcomes: Sequence[Outcome], expected: dict[Question, str]
) -> int:
    """Answers that differ; those of requests that failed are not among them."""
    pairs = zip(questions, outcomes, strict=True)
    return sum(not outcome.error and outcome.text != expected[question] for question, outcome in pairs)


# Figures.


def live_spans(run: LiveRun) -> list[Span]:
    """By phase, then of all."""
    outcomes = run.replayed.outcomes
    met = np.array([outcome.meets(SLO.ttft_s, SLO.tpot_s) for outcome in outcomes])
    ttft_s = np.array([outcome.ttft_s for outcome in outcomes])
    tpot_s = np.array([outcome.tpot_s for outcome in outcomes])
    return _spans(run.load, met, ttft_s, tpot_s)


def simulated_spans(load: Load, result: SimulationResult) -> list[Span]:
    """Likewise."""
    ttft_met, tpot_met = slo_met(result.requests, SLO)
    return _spans(load, ttft_met & tpot_met, result.requests.ttft_s, result.requests.tpot_s)


def _spans(load: Load, met: npt.NDArray[np.bool_], ttft_s: Floats, tpot_s: Floats) -> list[Span]:
    arrivals_s = np.array(load.arrivals_s)
    spans, start_s = [], 0.0
    bounds = []
    for phase in load.phases:
        bounds.append((phase.name, start_s, start_s + phase.seconds))
        start_s += phase.seconds
    for name, begin_s, end_s in (*bounds, ("all", 0.0, np.inf)):
        mine = (arrivals_s >= begin_s) & (arrivals_s < end_s)
        spans.append(
            Span(
                name=name,
                num_requests=int(mine.sum()),
                attainment=float(met[mine].mean()),
                ttft_s=_percentiles(ttft_s[mine]),
                tpot_s=_percentiles(tpot_s[mine]),
            )
        )
    return spans


def _percentiles(values: Floats) -> tuple[float, float]:
    p50, p90 = np.nanpercentile(values, [50, 90])
    return float(p50), float(p90)


# Tables.


def tables(run: LiveRun) -> list[Table]:
    """What happened, and what the simulator made of it."""
    title = (
        f"Live: {len(run.load.questions)} requests, {run.num_failed} failed, {run.num_wrong} answers other "
        f"than the plain engine's; CPU {run.cpu_share:.0%} of the machine"
    )
    headers = [
        "decided at (s)", "split", "workers", "running", "KV held",
        "first sent after (s)", "done after (s)", "its service (s)", "difference (s)",
    ]  # fmt: skip
    rows = [
        (
            f"{switch.at_s - run.replayed.start_s:.1f}",
            switch.split,
            f"{len(switch.worker_ids)} to {switch.role}",
            str(switch.num_running),
            str(switch.num_held),
            f"{switch.sent_after_s:.2f}",
            f"{switch.done_after_s:.2f}",
            f"{switch.service_s:.2f}",
            f"{switch.delay_s:.2f}",
        )
        for switch in run.switches
    ]
    return [Table(title, headers, rows), _decisions_table(run), _spans_table(run)]


def _decisions_table(run: LiveRun) -> Table:
    live = [(switch.at_s - run.replayed.start_s, switch.split) for switch in run.switches]
    simulated = [(each.at_s, each.split) for each in run.simulated.decisions if each.verdict is Verdict.MOVE]
    turns = [sum(phase.seconds for phase in run.load.phases[:n]) for n in range(len(run.load.phases))]
    rows = []
    for number, (phase, start_s) in enumerate(zip(run.load.phases, turns, strict=True)):
        end_s = turns[number + 1] if number + 1 < len(turns) else float("inf")
        pairs = zip_longest(*([m for m in moves if start_s <= m[0] < end_s] for moves in (live, simulated)))
        for ours, theirs in pairs:
            rows.append((phase.name, *(_move(each, start_s) for each in (ours, theirs))))
    return Table("Moves, seconds after the load turned", ["", "live", "simulated"], rows)


def _move(move: tuple[float, str] | None, start_s: float) -> str:
    return "-" if move is None else f"{move[0] - start_s:.1f}: {move[1]}"


def _spans_table(run: LiveRun) -> Table:
    headers = [
        "", "live in time", "simulated", "simulated, 2P+2D all along",
        "TTFT p50 / p90 (ms)", "simulated", "TPOT p50 / p90 (ms)", "simulated",
    ]  # fmt: skip
    live = live_spans(run)
    simulated, static = simulated_spans(run.load, run.simulated), simulated_spans(run.load, run.static)
    rows = [
        (
            ours.name,
            f"{ours.attainment:.1%}",
            f"{theirs.attainment:.1%}",
            f"{fixed.attainment:.1%}",
            *(_ms(each) for each in (ours.ttft_s, theirs.ttft_s, ours.tpot_s, theirs.tpot_s)),
        )
        for ours, theirs, fixed in zip(live, simulated, static, strict=True)
    ]
    return Table("Live and simulated, by phase", headers, rows)


def _ms(values_s: tuple[float, float]) -> str:
    return " / ".join(f"{1e3 * value:.0f}" for value in values_s)


def as_json(run: LiveRun) -> dict[str, Any]:
    return {
        "num_requests": len(run.load.questions),
        "num_failed": run.num_failed,
        "num_wrong": run.num_wrong,
        "cpu_share": run.cpu_share,
        "switches": [
            {
                "at_s": switch.at_s - run.replayed.start_s,
                "split": switch.split,
                "reason": switch.reason,
                "num_workers": len(switch.worker_ids),
                "role": switch.role,
                "num_running": switch.num_running,
                "num_held": switch.num_held,
                "sent_after_s": switch.sent_after_s,
                "done_after_s": switch.done_after_s,
                "service_s": switch.service_s,
            }
            for switch in run.switches
        ],
        "simulated_moves": [
            {"at_s": each.at_s, "split": each.split, "reason": each.reason}
            for each in run.simulated.decisions
            if each.verdict is Verdict.MOVE
        ],
        "live": [asdict(span) for span in live_spans(run)],
        "simulated": [asdict(span) for span in simulated_spans(run.load, run.simulated)],
        "simulated_static": [asdict(span) for span in simulated_spans(run.load, run.static)],
    }
