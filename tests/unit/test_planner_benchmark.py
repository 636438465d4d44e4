"""The planner benchmark: its loads, its schedules, and an oracle that nothing beats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import planner, planner_published
from benchmarks.planner_cases import Case, CaseResult
from benchmarks.planner_loads import (
    BURSTY,
    GENERATED,
    LONG_ANSWERS,
    MIDDLE,
    PHASE_S,
    PHASE_SHIFT,
    SHIFT_LOAD,
    Capacities,
    constant,
    recorded,
    stationary,
)
from benchmarks.planner_oracle import best_path, earlier, schedule_of, search, static_runs
from benchmarks.planner_runs import WINDOW_S, Scene, run_planner, run_schedule, run_static
from benchmarks.planner_schedule import Change, Rule, tidy
from benchmarks.planner_schedule import switches as actions_of
from benchmarks.planner_stability import num_switched
from benchmarks.routing_runs import TRACES_VARIABLE
from core.types import Role
from simulator.actions import SwitchRole

DATA = Path(__file__).parent.parent / "data" / "traces"
RATES = Capacities(long_prompts_rps=18.0, long_answers_rps=40.0)


def change(start_s: float, num_prefill: int) -> Change:
    return Change(start_s=start_s, num_prefill=num_prefill)


SHORT_PHASES = tidy([change(0, 2), change(20, 1)])


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(trace=GENERATED[BURSTY](RATES, 40.0, 3), num_gpus=3)


@pytest.mark.parametrize("name", GENERATED)
def test_a_load_is_the_same_for_the_same_seed_only(name: str) -> None:
    trace = GENERATED[name](RATES, 60.0, 1)
    assert trace == GENERATED[name](RATES, 60.0, 1)
    assert trace != GENERATED[name](RATES, 60.0, 2)
    assert 0 <= trace.requests[0].arrival_s < trace.requests[-1].arrival_s < 60.0


def test_each_phase_runs_at_the_same_share_of_its_own_capacity() -> None:
    trace = GENERATED[PHASE_SHIFT](RATES, 2 * PHASE_S, 1)
    first = [request for request in trace.requests if request.arrival_s < PHASE_S]
    second = trace.requests[len(first) :]
    assert len(first) / PHASE_S == pytest.approx(SHIFT_LOAD * RATES.long_prompts_rps, rel=0.1)
    assert len(second) / PHASE_S == pytest.approx(SHIFT_LOAD * RATES.long_answers_rps, rel=0.1)
    assert np.mean([request.prompt_tokens for request in first]) == pytest.approx(6000, rel=0.1)
    assert np.mean([request.output_tokens for request in second]) == pytest.approx(700, rel=0.1)


def test_a_constant_load_has_one_gap_and_one_length() -> None:
    trace = constant(MIDDLE, 4.0, 10.0)
    assert np.diff([request.arrival_s for request in trace.requests]) == pytest.approx(0.25)
    assert {(request.prompt_tokens, request.output_tokens) for request in trace.requests} == {(2000, 300)}


def test_a_recorded_trace_is_copied_to_reach_its_rate_and_copies_share_no_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TRACES_VARIABLE, str(DATA))
    once = recorded("Mooncake conversation", 0.2, 60.0, 1)
    assert len(once.requests) == 12
    many = recorded("Mooncake conversation", 20.0, 60.0, 1)
    assert len(many.requests) == pytest.approx(1200, rel=0.1)
    assert max(request.arrival_s for request in many.requests) <= 60.0
    first_blocks = [request.block_hashes[0] for request in many.requests if request.block_hashes]
    assert len(set(first_blocks)) > len({r.block_hashes[0] for r in once.requests if r.block_hashes})


def test_a_schedule_becomes_switches_of_the_workers_at_the_border() -> None:
    schedule = tidy([change(0, 1), change(20, 3), change(50, 2)])
    assert actions_of(schedule, "worker", 5) == [
        SwitchRole(time_s=20, worker_id="worker-1", role=Role.PREFILL),
        SwitchRole(time_s=20, worker_id="worker-2", role=Role.PREFILL),
        SwitchRole(time_s=50, worker_id="worker-2", role=Role.DECODE),
    ]


def test_tidy_keeps_one_change_a_time_and_none_that_changes_nothing() -> None:
    untidy = [change(30, 2), change(0, 1), change(30, 3), change(-5, 2), change(40, 3)]
    assert tidy(untidy) == (change(0, 1), change(30, 3))
    assert earlier(tidy(untidy), 10.0) == (change(0, 1), change(20, 3))


@pytest.mark.parametrize("rule", Rule)
def test_a_simulated_cluster_follows_a_schedule(scene: Scene, rule: Rule) -> None:
    run = run_schedule(scene, SHORT_PHASES, rule)
    assert [(step.num_prefill, step.num_decode) for step in run.steps] == [(2, 1), (1, 2)]
    assert run.steps[1].time_s == pytest.approx(20.0, abs=1.5)
    assert run.num_switches == num_switched(run, 0.0) == 1
    assert schedule_of(run)[1].start_s == pytest.approx(20.0, abs=1.5)


def test_the_first_guess_takes_the_best_of_each_window_unless_moves_cost_more() -> None:
    values = np.array([[9.0, 5.0, 0.0], [9.0, 5.0, 0.0], [0.0, 5.0, 9.0], [0.0, 5.0, 9.0]])
    assert best_path(values, price=1.0) == [0, 0, 2, 2]
    assert best_path(values, price=100.0) in ([0] * 4, [1] * 4, [2] * 4)
    assert sum(row[split] for row, split in zip(values, best_path(values, 100.0), strict=True)) == 20.0


def test_nothing_beats_the_oracle(scene: Scene) -> None:
    statics = static_runs(scene)
    own = run_planner(scene, 1)
    oracle = search(scene, statics, own, budget=5)
    assert list(statics) == [0, 1, 2]
    assert oracle.run.num_met >= max(own.num_met, *(run.num_met for run in statics.values()))
    assert 4 <= oracle.num_simulations <= 9
    assert sum(oracle.run.met_by_window) == oracle.run.num_met


def test_large_clusters_are_searched_from_coarse_to_fine() -> None:
    scene = Scene(trace=stationary(LONG_ANSWERS, 20.0, 5.0, 1), num_gpus=24)
    splits = list(static_runs(scene))
    assert {0, 3, 6, 9, 12, 15, 18, 21} <= set(splits)
    assert len(splits) < 24


def test_tables_name_the_best_split_and_what_the_planner_is_to_the_oracle(scene: Scene) -> None:
    statics = static_runs(scene)
    own = run_static(scene, 1)
    case = Case(load=BURSTY, num_gpus=3, duration_s=40.0, budget=3)
    outcome = CaseResult(
        case=case,
        capacities={},
        offered_rps=len(scene.trace.requests) / 40,
        statics=statics,
        planner=own,
        oracle=search(scene, statics, own, budget=3),
    )
    [row] = planner._goodput([outcome]).rows
    assert row[0] == "bursty, 3, 40"
    assert outcome.best_static.name in row[2]
    assert row[7] == f"**{own.num_met / outcome.oracle.run.num_met:.3f}**"
    assert [len(table.rows) for table in (planner._splits([outcome]), planner._details([outcome]))] == [1, 3]


def test_the_published_rate_swings_as_published() -> None:
    trace = planner_published.trace(1)
    arrivals_s = np.array([request.arrival_s for request in trace.requests])
    rates, _ = np.histogram(arrivals_s, bins=10, range=(0.0, 600.0))
    assert rates[0] / 60 == pytest.approx(6.3, rel=0.2)
    assert max(rates) / 60 == pytest.approx(44.0, rel=0.1)
    assert len(arrivals_s) / 600 == pytest.approx(25.0, rel=0.05)


def test_windows_cover_the_whole_trace(scene: Scene) -> None:
    run = run_static(scene, 1)
    assert len(run.met_by_window) == int(scene.trace.duration_s // WINDOW_S) + 1
