"""The routing benchmark: what its load factor means, and that its tables show every case."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import routing
from benchmarks.routing_runs import (
    PROFILE,
    TRACES_VARIABLE,
    Bound,
    Case,
    Figures,
    case_trace,
    run,
    traces_folder,
)
from core.step_times import prefill_s
from core.table_step_time import TableStepTime
from router.policies import POLICY_NAMES
from simulator.profiles.files import find_profile

DATA = Path(__file__).parent.parent / "data" / "traces"


def figures(goodput_rps: float, bound: Bound | None) -> Figures:
    return Figures(
        num_requests=100,
        duration_s=10.0,
        attainment=goodput_rps / 10,
        ttft_attainment=0.9,
        goodput_rps=goodput_rps,
        ttft_s=(0.1, 0.2, 0.3),
        tpot_s=(0.01, 0.02, 0.03),
        cached_share=0.25,
        bound=bound,
    )


def test_at_load_one_uncached_prompts_take_all_the_time_of_the_prefill_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TRACES_VARIABLE, str(DATA))
    case = Case(trace="Mooncake conversation", num_workers=8, load=1.0, policy="predictive", num_requests=120)
    trace = case_trace(case)
    step_time = TableStepTime(find_profile(PROFILE))
    work_s = sum(prefill_s(step_time, request.prompt_tokens, 0) for request in trace.requests)
    assert (case.num_prefill, len(trace.requests), trace.requests[0].arrival_s) == (5, 120, 0.0)
    assert work_s == pytest.approx(5 * trace.duration_s)


def test_a_run_stays_below_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACES_VARIABLE, str(DATA))
    case = Case(
        trace="Mooncake conversation",
        num_workers=4,
        load=0.7,
        policy="predictive",
        num_requests=100,
        with_bound=True,
    )
    result = run(case)
    assert result.bound is not None
    assert 0.5 < result.attainment <= result.bound.with_own_caches <= result.bound.attainment <= 1.0


def test_a_missing_trace_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TRACES_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"mooncake_conversation\.jsonl is missing"):
        traces_folder()


def test_tables_compare_with_the_others_and_with_the_bound() -> None:
    grid = routing.Grid(num_requests={16: 50}, loads=(1.0,), router_loads=(1.0,), num_routers=(1, 2))
    bound = Bound(attainment=1.0, with_own_caches=0.95)
    goodput = dict(zip(POLICY_NAMES, (8.0, 4.0, 2.0, 1.0, 0.0), strict=True))
    results = {case: figures(goodput[case.policy], None) for case in routing.policy_cases(grid)}
    for case in routing.router_cases(grid):
        results[case] = figures(8.0 if case.num_routers == 1 else 7.6, None)
    results = {
        case: figures(result.goodput_rps, bound) if case.with_bound else result
        for case, result in results.items()
    }
    side_by_side, losses, routers, *details = routing.tables(results, grid)
    assert side_by_side.rows[0][-5:] == ("**8.00**", "8.00", "2.00", "10.0", "80%")
    assert losses.rows[0][1:] == ("100.0%", "-5.0", "-5.0", "-10.0", "**80.0%**")
    assert routers.rows[0][1:] == ("8.00", "7.60 (-5.0%)")
    assert [len(table.rows) for table in details] == [5, 5, 5]
