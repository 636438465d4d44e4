"""The planner in charge of real engines: it follows the load both ways at work, and no answer changes.

The engines are paced, so that what the planner decides hangs on their times and not on the machine's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.model import NAME
from benchmarks.planner_live import num_wrong, plain_answers
from benchmarks.planner_live_load import Load, Replayed, make_load, replay
from benchmarks.planner_live_setup import (
    LONG_ANSWERS,
    LONG_PROMPTS,
    engine_args,
    live_config,
    paced_profile,
)
from benchmarks.planner_live_switches import Switch, switches
from benchmarks.servers import PlainVllm
from simulator.profiles.files import write_profile
from tests.integration.cluster_process import READY, start_cluster
from tests.integration.served import ServedByBaton

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
PHASES = (
    replace(LONG_PROMPTS, seconds=5.0),
    replace(LONG_ANSWERS, seconds=18.0, rate_rps=16.0),
    replace(LONG_PROMPTS, seconds=14.0),
)
START_TIMEOUT_S = 240.0
MAX_DELAY_S = 1.0
MIN_OLD_REQUESTS = 8


@dataclass(frozen=True, kw_only=True)
class Run:
    """A load that turned twice, and what came of it."""

    load: Load
    replayed: Replayed
    moves: list[dict[str, Any]]
    switches: list[Switch]
    num_wrong: int

    def at_s(self, switch: Switch) -> float:
        return switch.at_s - self.replayed.start_s


@pytest.fixture(scope="module")
def run(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run_dir = tmp_path_factory.mktemp("planned")
    profile = run_dir / "paced.json"
    write_profile(paced_profile(), profile)
    config = live_config(model_path, profile, num_prefill=3)
    load = make_load(PHASES, seed=2)
    config_path = run_dir / "cluster.yaml"
    config_path.write_text(config.model_dump_json())
    process = start_cluster(config_path, run_dir / "cluster.log")
    try:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with PlainVllm(model_path, config, engine_args()) as plain:
            expected = plain_answers(f"http://127.0.0.1:{plain.port}", load.questions)
        process.wait_until(lambda: READY in process.log_tail(1 << 20), START_TIMEOUT_S)
        cluster = ServedByBaton(f"http://127.0.0.1:{config.router.port}", NAME, process.pid)
        replayed = replay(cluster.url, load)
        moves = cluster.get("/baton/planner?moves=true&last=1000")["decisions"]
        traces = [outcome.trace for outcome in replayed.outcomes if outcome.trace]
        yield Run(
            load=load,
            replayed=replayed,
            moves=moves,
            switches=switches(moves, traces, time.monotonic() - time.time()),
            num_wrong=num_wrong(load.questions, replayed.outcomes, expected),
        )
        cluster.close()
    finally:
        process.stop(grace_s=40)


def described(run: Run) -> str:
    return "\n".join(
        f"{run.at_s(switch):.1f} s: {switch.split}, {len(switch.worker_ids)} to {switch.role}, "
        f"{switch.num_running} running, {switch.num_held} held, "
        f"first sent after {switch.sent_after_s:.2f} s, done after {switch.done_after_s:.2f} s "
        f"and served in {switch.service_s:.2f} s; {switch.reason}"
        for switch in run.switches
    )


def test_no_request_fails_and_every_answer_is_the_plain_engines(run: Run) -> None:
    failed = [outcome.error for outcome in run.replayed.outcomes if outcome.error]
    assert failed == []
    assert run.num_wrong == 0
    assert all(move["carried_out"] and not move["failures"] for move in run.moves), run.moves


@pytest.mark.parametrize(("role", "phase"), [("decode", 1), ("prefill", 2)])
def test_workers_follow_the_load_and_are_at_work_within_a_second(run: Run, role: str, phase: int) -> None:
    print(described(run))
    begin_s = sum(each.seconds for each in PHASES[:phase])
    mine = [
        switch
        for switch in run.switches
        if switch.role == role and begin_s <= run.at_s(switch) < begin_s + PHASES[phase].seconds
    ]
    assert mine, f"no worker began to {role}:\n{described(run)}"
    busiest = max(mine, key=lambda switch: switch.num_old)
    outcomes = run.replayed.outcomes
    assert sum(each.sent_s <= busiest.at_s < each.last_s for each in outcomes) >= MIN_OLD_REQUESTS
    if role == "prefill":  # a prefill worker may have handed over all it had
        assert busiest.num_old >= MIN_OLD_REQUESTS, described(run)
    assert busiest.delay_s <= MAX_DELAY_S, described(run)
