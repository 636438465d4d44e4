"""What holds for every simulation, whatever arrives, on whatever cluster, whatever happens to it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.request import Path
from core.types import Role
from core.worker_events import WorkerModelConfig
from simulator.actions import (
    Action,
    AddWorker,
    FailPulls,
    Kill,
    RemoveWorker,
    SlowLink,
    Stall,
    SwitchRole,
)
from simulator.reports.summary import summarize, to_json
from simulator.result import Outcome, SimulationResult, Slo
from simulator.simulation import simulate
from simulator.spec import ClusterSpec
from simulator.traces.trace import Trace, TraceRequest
from tests.unit.simulated import CheckedSimulation, Computed, cluster, group

LEASE_S = 4.0
QUIET_S = 80.0
"""Longer than any lease, start-up, stall or timeout below."""

requests = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.03, 0.4, 2.0]),  # since the request before
        st.one_of(st.integers(1, 40), st.integers(1, 120)),
        st.one_of(st.just(1), st.just(2), st.integers(1, 40)),
        st.sampled_from([0, 0, 1, 2]),  # prompts of one family share their beginnings
    ),
    max_size=25,
)
workers = st.builds(
    WorkerModelConfig,
    num_kv_blocks=st.sampled_from([10, 20, 40, 400]),
    block_size_tokens=st.just(4),
    hash_block_tokens=st.sampled_from([4, 8]),
    max_num_seqs=st.sampled_from([1, 2, 8]),
    max_num_batched_tokens=st.sampled_from([8, 16, 256]),
    lease_s=st.just(LEASE_S),
)
clusters = st.builds(
    cluster,
    st.integers(0, 4),
    st.integers(1, 4),
    group_settings=st.fixed_dictionaries(
        {"worker": workers, "startup_s": st.sampled_from([0.0, 0.2, 3.0]), "gpus_per_worker": st.just(2.0)}
    ),
    num_routers=st.integers(1, 3),
    heartbeat_s=st.sampled_from([0.25, 1.0]),
    prefill_timeout_s=st.sampled_from([0.5, 60.0]),
    stall_timeout_s=st.sampled_from([0.5, 3.0]),
    max_ongoing_requests=st.sampled_from([0, 0, 3]),
    restart=st.booleans(),
    rpc_s=st.sampled_from([0.0, 0.0005, 0.01]),
)
times_s = st.one_of(st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0, 3))
ids = st.integers(0, 5).map(lambda number: f"w-{number}")
durations_s = st.sampled_from([0.05, 0.6, 5.0, 20.0])
roles = st.sampled_from(Role)
actions = st.lists(
    st.one_of(
        st.builds(Kill, time_s=times_s, worker_id=ids),
        st.builds(Kill, time_s=times_s, worker_id=ids),
        st.builds(Stall, time_s=times_s, worker_id=ids, duration_s=durations_s),
        st.builds(FailPulls, time_s=times_s, worker_id=ids, duration_s=durations_s),
        st.builds(
            SlowLink,
            time_s=times_s,
            worker_id=ids,
            duration_s=durations_s,
            factor=st.sampled_from([3.0, 100.0]),
        ),
        st.builds(SwitchRole, time_s=times_s, worker_id=ids, role=roles),
        st.builds(AddWorker, time_s=times_s, shape=st.just("w"), role=roles),
        st.builds(RemoveWorker, time_s=times_s, worker_id=ids),
    ),
    max_size=8,
)


def make_trace(rows: list[tuple[float, int, int, int]], hash_block_tokens: int) -> Trace:
    made, arrival_s = [], 0.0
    for since_s, prompt, output, family in rows:
        arrival_s += since_s
        num_hashes = prompt // hash_block_tokens if family else 0
        made.append(
            TraceRequest(
                arrival_s=arrival_s,
                prompt_tokens=prompt,
                output_tokens=output,
                block_hashes=tuple(1000 * family + n for n in range(num_hashes)),
            )
        )
    return Trace(name="t", requests=tuple(made), hash_block_tokens=hash_block_tokens)


def trace_for(rows: list[tuple[float, int, int, int]], spec: ClusterSpec) -> Trace:
    return make_trace(rows, spec.groups[0].worker.hash_block_tokens)


def check_result(trace: Trace, result: SimulationResult) -> None:
    table, asked = result.requests, np.array([r.output_tokens for r in trace.requests], dtype=np.int64)
    for column in fields(table):
        values = getattr(table, column.name)
        assert values is None or len(values) == len(trace.requests)
    done = table.outcome == Outcome.DONE
    assert set(table.outcome) <= {outcome.value for outcome in Outcome}
    assert (table.output_tokens[done] == asked[done]).all()
    assert (table.output_tokens <= asked).all()
    assert (table.ttft_s[done] > 0).all()
    assert (table.ttft_s[done] <= table.e2e_s[done]).all()
    assert np.isnan(table.e2e_s[~done]).all()
    assert np.isnan(table.ttft_s[table.outcome == Outcome.REJECTED]).all()
    assert (np.isfinite(table.tpot_s) == (done & (asked > 1))).all()
    assert (table.path[done] != Path.NONE).all()
    assert ((table.path == Path.PREFILL_ONLY) <= (asked == 1)).all()
    assert (table.cached_tokens >= 0).all()
    assert (table.cached_tokens < table.prompt_tokens).all()
    assert (result.gaps.gap_s >= 0).all()
    assert (result.gaps.weight > 0).all()
    assert not (table.prefill_queue_s < 0).any()
    assert not (table.transfer_s < 0).any()
    assert result.timeline.kv_use.min(initial=0) >= 0
    assert result.timeline.kv_use.max(initial=0) <= 1
    assert (np.diff([event.time_s for event in result.events]) >= 0).all()
    assert (table.output_tokens[table.outcome == Outcome.REJECTED] == 0).all()
    assert (table.output_tokens[table.outcome == Outcome.FAILED] > 0).all()
    assert result.simulated_s > np.nanmax(table.arrival_s + table.e2e_s, initial=0) - 1e-9
    # No token is sent twice, and none without its gap.
    assert result.gaps.weight.sum() == np.maximum(table.output_tokens - 1, 0).sum()
    if done.all():
        gaps_s = float((result.gaps.gap_s * result.gaps.weight).sum())
        assert gaps_s == pytest.approx(float((table.e2e_s - table.ttft_s).sum()))


class TestLaws:
    @settings(max_examples=120, deadline=None)
    @given(requests, clusters, actions, st.integers(0, 3))
    def test_whatever_happens_every_request_ends_once_and_nothing_is_left(
        self, rows: list[Any], spec: ClusterSpec, what_happens: list[Action], seed: int
    ) -> None:
        trace = trace_for(rows, spec)
        simulation = CheckedSimulation(trace, spec, what_happens, seed)
        result = simulation.run()
        check_result(trace, result)
        simulation.assert_nothing_is_left(QUIET_S)

    @settings(max_examples=80, deadline=None)
    @given(requests, clusters)
    def test_without_faults_only_what_cannot_fit_or_is_too_much_is_not_answered(
        self, rows: list[Any], spec: ClusterSpec
    ) -> None:
        trace = trace_for(rows, spec)
        simulation = CheckedSimulation(trace, spec)
        result = simulation.run()
        check_result(trace, result)
        simulation.assert_nothing_is_left(QUIET_S)
        capacity = spec.groups[0].worker.kv_capacity_tokens
        fits = np.array(
            [r.prompt_tokens + r.output_tokens - 1 <= capacity for r in trace.requests], dtype=bool
        )
        done = result.requests.outcome == Outcome.DONE
        assert not (done & ~fits).any()
        if (
            not spec.max_ongoing_requests
            and len(rows) <= 4 * spec.groups[0].worker.max_num_seqs
            and spec.stall_timeout_s > 1
        ):
            assert (done == fits).all()
        assert not result.events
        assert result.num_recomputed == 0
        num_gpus = 2.0 * sum(spec.groups[0].num_workers.values())
        assert result.gpu_seconds == pytest.approx(num_gpus * result.simulated_s)

    @settings(max_examples=80, deadline=None)
    @given(requests, st.integers(1, 3), st.sampled_from([4, 8]))
    def test_prefill_workers_compute_each_token_that_is_not_cached_once(
        self, rows: list[Any], num_prefill: int, hash_block_tokens: int
    ) -> None:
        worker = WorkerModelConfig(
            num_kv_blocks=4000,
            block_size_tokens=4,
            hash_block_tokens=hash_block_tokens,
            max_num_seqs=32,
            max_num_batched_tokens=48,
        )
        computed = Computed()
        prefill = group(
            num_prefill, 0, shape="p", worker=worker, step_time=computed, assumed_step_time=Computed()
        )
        trace = make_trace(rows, hash_block_tokens)
        result = simulate(trace, ClusterSpec(groups=(prefill, group(0, 2, shape="d", worker=worker))))
        assert (result.requests.outcome == Outcome.DONE).all()
        uncached = result.requests.prompt_tokens - result.requests.cached_tokens
        assert computed.num_tokens == uncached.sum()

    @settings(max_examples=30, deadline=None)
    @given(requests, clusters, actions, st.integers(0, 3))
    def test_the_same_seed_gives_the_same_result(
        self, rows: list[Any], spec: ClusterSpec, what_happens: list[Action], seed: int
    ) -> None:
        trace = trace_for(rows, spec)
        first, second = (simulate(trace, spec, actions=what_happens, seed=seed) for _ in range(2))
        for part in ("requests", "gaps", "timeline"):
            for column in fields(getattr(first, part)):
                one, other = (getattr(getattr(result, part), column.name) for result in (first, second))
                assert (one is None and other is None) or one.tobytes() == other.tobytes()
        assert first.events == second.events
        assert as_json(first) == as_json(second)

    def test_the_order_of_hashes_in_the_process_does_not_matter(self) -> None:
        outputs = {
            subprocess.run(
                [sys.executable, "-c", "from tests.unit import test_simulator_laws as t; t.print_a_story()"],
                env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                check=True,
                text=True,
            ).stdout
            for seed in ("1", "2")
        }
        (output,) = outputs
        assert '"num_done"' in output


class TestCost:
    def test_events_grow_with_the_requests(self) -> None:
        few, many = (num_events(num_requests, num_workers=8) for num_requests in (500, 4000))
        assert many / 4000 < 1.1 * few / 500
        assert many / 4000 < 60

    def test_events_a_request_do_not_grow_with_the_workers(self) -> None:
        few, many = (num_events(1000, num_workers) for num_workers in (8, 128))
        assert many < 1.2 * few


def num_events(num_requests: int, num_workers: int) -> int:
    """Of one trace at one rate for each worker."""
    simulation = CheckedSimulation(steady_trace(num_requests, num_workers), cluster(num_workers, num_workers))
    simulation.check_workers = lambda: None  # type: ignore[method-assign]
    result = simulation.run()
    assert (result.requests.outcome == Outcome.DONE).all()
    return simulation.num_events


def steady_trace(num_requests: int, num_workers: int) -> Trace:
    rng = np.random.default_rng(0)
    arrivals_s = np.cumsum(rng.exponential(0.1 / num_workers, num_requests))
    lengths = rng.integers(1, 100, (num_requests, 2))
    rows = [
        TraceRequest(arrival_s=float(arrival_s), prompt_tokens=int(prompt), output_tokens=int(output))
        for arrival_s, (prompt, output) in zip(arrivals_s, lengths, strict=True)
    ]
    return Trace(name="steady", requests=tuple(rows))


def as_json(result: SimulationResult) -> str:
    return to_json(summarize(result, Slo(ttft_s=0.1, tpot_s=0.01), settings={"seed": 0}))


def print_a_story() -> None:
    """One eventful simulation as JSON, for another process to compare."""
    rows = [(0.01 * (n % 3), 1 + 7 * n % 90, 1 + 11 * n % 40, n % 3) for n in range(120)]
    worker = WorkerModelConfig(
        num_kv_blocks=40, block_size_tokens=4, max_num_seqs=4, max_num_batched_tokens=32
    )
    spec = cluster(2, 3, group_settings={"worker": worker}, num_routers=3, stall_timeout_s=0.3)
    story: list[Action] = [
        Stall(time_s=0.1, worker_id="w-2", duration_s=0.5),
        Kill(time_s=0.3, worker_id="w-0"),
        Kill(time_s=0.4, worker_id="w-3"),
        SwitchRole(time_s=0.2, worker_id="w-4", role=Role.PREFILL),
        AddWorker(time_s=0.5, shape="w", role=Role.DECODE),
        FailPulls(time_s=0.0, worker_id="w-3", duration_s=0.2),
    ]
    result = simulate(make_trace(rows, 4), spec, actions=story, seed=5)
    print(as_json(result), result.requests.e2e_s.tolist(), result.gaps.gap_s.tolist())
