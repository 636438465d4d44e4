"""The simulator and a cluster of mock engines in real time do the same, and what can be computed by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from core.performance_model import KvLink, LinearStepTime
from core.request import Path
from core.worker_events import WorkerModelConfig
from simulator.actions import FailPulls, Kill, Stall
from simulator.result import Outcome
from simulator.traces.trace import Trace, TraceRequest
from tests.integration.scenario_backends import (
    BACKENDS,
    RPC_S,
    Backend,
    Row,
    Scenario,
    run_mock_cluster,
    run_simulator,
)

# A prompt of n tokens alone takes 60 + n/5 ms, a decode step of b sequences 30 + 10b ms.
STEP = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.2,
    prefill_base_ms=60.0,
    decode_base_ms=30.0,
    decode_ms_per_seq=10.0,
    decode_ms_per_kv_token=0.0,
)
CHUNK_S = 0.030
DECODE_S = 0.040
HANDOFF_S = 2 * RPC_S + 0.002
SMALL = WorkerModelConfig(num_kv_blocks=20, max_num_seqs=8, max_num_batched_tokens=512)
# What a timer or a call may be late on a busy machine; steps follow each other without a gap.
LATE_S = 0.025
LATE_TPOT_S = 0.003
DONE, REJECTED, FAILED = Outcome.DONE, Outcome.REJECTED, Outcome.FAILED


def prefill_s(num_tokens: int) -> float:
    return 0.060 + 0.0002 * num_tokens


def trace(*requests: tuple[float, int, int]) -> Trace:
    return Trace(
        name="t",
        requests=tuple(TraceRequest(arrival_s=a, prompt_tokens=p, output_tokens=o) for a, p, o in requests),
        hash_block_tokens=16,
    )


def scenario(num_prefill: int, num_decode: int, **more: object) -> Scenario:
    return Scenario(num_prefill=num_prefill, num_decode=num_decode, step_time=STEP, **more)  # type: ignore[arg-type]


def about(seconds: float) -> object:
    return pytest.approx(seconds, abs=LATE_S)


def check(row: Row, path: Path, *, ttft_s: float, tpot_s: float, num_tokens: int) -> None:
    assert (row.outcome, row.path) == (DONE, path)
    assert row.ttft_s == about(ttft_s)
    # The first gap takes in the lateness of a first token.
    assert row.tpot_s == pytest.approx(tpot_s, abs=LATE_TPOT_S + LATE_S / (num_tokens - 1))
    assert row.e2e_s == about(ttft_s + (num_tokens - 1) * tpot_s)


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


class TestOneRequest:
    def test_prefilled_remotely(self, run: Backend) -> None:
        (row,) = run(trace((0.0, 200, 8)), scenario(1, 1))
        tpot_s = (HANDOFF_S + 7 * DECODE_S) / 7
        check(row, Path.REMOTE_EARLY, ttft_s=prefill_s(200) + 2 * RPC_S, tpot_s=tpot_s, num_tokens=8)

    def test_prefilled_by_the_decode_worker(self, run: Backend) -> None:
        (row,) = run(trace((0.0, 200, 8)), scenario(0, 1))
        check(row, Path.LOCAL, ttft_s=prefill_s(200) + 2 * RPC_S, tpot_s=DECODE_S, num_tokens=8)

    def test_an_answer_of_one_token(self, run: Backend) -> None:
        (row,) = run(trace((0.0, 200, 1)), scenario(1, 1))
        assert (row.outcome, row.path) == (DONE, Path.PREFILL_ONLY)
        assert row.ttft_s == row.e2e_s == about(prefill_s(200) + 2 * RPC_S)

    def test_prefilled_in_chunks(self, run: Backend) -> None:
        worker = WorkerModelConfig(num_kv_blocks=2000, max_num_seqs=8, max_num_batched_tokens=256)
        (row,) = run(trace((0.0, 1000, 4)), scenario(1, 1, worker=worker))
        ttft_s = prefill_s(1000) + 3 * CHUNK_S + 2 * RPC_S
        check(row, Path.REMOTE_EARLY, ttft_s=ttft_s, tpot_s=DECODE_S + HANDOFF_S / 3, num_tokens=4)

    def test_a_slow_transfer_delays_the_second_token(self, run: Backend) -> None:
        slow = KvLink(latency_s=0.05, bytes_per_s=65_536 * 1000.0)
        (row,) = run(trace((0.0, 200, 5)), scenario(1, 1, link=slow))
        tpot_s = (2 * RPC_S + 0.05 + 0.2 + 4 * DECODE_S) / 4
        check(row, Path.REMOTE_EARLY, ttft_s=prefill_s(200) + 2 * RPC_S, tpot_s=tpot_s, num_tokens=5)

    def test_a_prompt_that_was_there_before(self, run: Backend) -> None:
        prompt = TraceRequest(
            arrival_s=0.0, prompt_tokens=1000, output_tokens=3, block_hashes=tuple(range(62))
        )
        again = replace(prompt, arrival_s=0.7)
        rows = run(Trace(name="t", requests=(prompt, again), hash_block_tokens=16), scenario(1, 1))
        assert [row.path for row in rows] == [Path.REMOTE_EARLY] * 2
        assert rows[0].ttft_s == about(prefill_s(1000) + 2 * RPC_S)
        assert rows[1].ttft_s == about(prefill_s(8) + 2 * RPC_S)


class TestSeveral:
    def test_a_prompt_waits_for_the_one_before(self, run: Backend) -> None:
        rows = run(trace((0.0, 1000, 3), (0.02, 1000, 3)), scenario(1, 1))
        assert rows[0].ttft_s == about(prefill_s(1000) + 2 * RPC_S)
        assert rows[1].ttft_s == about(2 * prefill_s(1000) - 0.02 + 2 * RPC_S)

    def test_prompts_that_wait_together_are_prefilled_together(self, run: Backend) -> None:
        rows = run(trace((0.0, 1000, 1), (0.02, 300, 1), (0.04, 300, 1)), scenario(1, 1))
        end_s = prefill_s(1000) + prefill_s(600) + 2 * RPC_S
        assert [row.ttft_s for row in rows[1:]] == [about(end_s - 0.02), about(end_s - 0.04)]

    def test_a_batch_slows_each_of_its_decodes(self, run: Backend) -> None:
        rows = run(trace(*[(0.02 * n, 10, 16) for n in range(4)]), scenario(0, 1))
        # The other three prompts share the step after the first one's; then there are four sequences.
        together_s = prefill_s(30) + 0.010
        assert rows[0].tpot_s == pytest.approx((together_s + 14 * 0.070) / 15, abs=LATE_TPOT_S)
        assert [row.tpot_s for row in rows[1:]] == [
            pytest.approx((14 * 0.070 + 0.060) / 15, abs=LATE_TPOT_S)
        ] * 3

    def test_prompts_spread_over_the_prefill_workers(self, run: Backend) -> None:
        rows = run(trace(*[(0.005 * n, 500, 3) for n in range(4)]), scenario(4, 1))
        assert [row.path for row in rows] == [Path.REMOTE_EARLY] * 4
        assert [row.ttft_s for row in rows] == [about(prefill_s(500) + 2 * RPC_S)] * 4


class TestLimits:
    def test_without_a_promise_of_room_the_decode_worker_gives_the_first_token(self, run: Backend) -> None:
        # 320 tokens of KV each: the first one's promise leaves no room for the second one's.
        worker = SMALL
        rows = run(trace((0.0, 200, 8), (0.01, 200, 3)), scenario(2, 1, worker=worker))
        assert [row.outcome for row in rows] == [DONE, DONE]
        assert [row.path for row in rows] == [Path.REMOTE_EARLY, Path.REMOTE]
        # It waits until the first one is through, and keeps its KV at its source for so long.
        assert rows[1].ttft_s == about(rows[0].e2e_s - 0.01 + 0.005 + DECODE_S)

    def test_a_prompt_that_never_fits_is_refused(self, run: Backend) -> None:
        rows = run(trace((0.0, 321, 3), (0.1, 100, 3)), scenario(1, 1, worker=SMALL))
        assert [(row.outcome, row.path) for row in rows] == [(REJECTED, Path.NONE), (DONE, Path.REMOTE_EARLY)]

    def test_an_answer_that_never_fits_fails_after_its_first_token(self, run: Backend) -> None:
        (row,) = run(trace((0.0, 300, 30)), scenario(1, 1, worker=SMALL))
        assert row.outcome == FAILED
        assert row.ttft_s == about(prefill_s(300) + 2 * RPC_S)

    def test_too_many_requests_are_refused(self, run: Backend) -> None:
        worker = replace(SMALL, max_num_seqs=1)
        rows = run(trace(*[(0.02 * n, 50, 4) for n in range(6)]), scenario(0, 1, worker=worker))
        assert [row.outcome for row in rows] == [DONE] * 4 + [REJECTED] * 2
        each_s = prefill_s(50) + 3 * DECODE_S
        assert rows[3].e2e_s == about(4 * each_s - 0.06 + 2 * RPC_S)

    def test_who_is_preempted_is_answered_late_but_in_full(self, run: Backend) -> None:
        worker = replace(SMALL, num_kv_blocks=6)
        rows = run(trace((0.0, 40, 20), (0.01, 40, 20)), scenario(0, 1, worker=worker))
        # Eight steps later the first one's 48 tokens of KV are full, and the other one has to make room.
        together_s = prefill_s(40) + prefill_s(40) + 0.010 + 7 * 0.050
        assert rows[0].e2e_s == about(together_s + 11 * DECODE_S + 2 * RPC_S)
        late_s = rows[1].e2e_s - (rows[0].e2e_s - 0.01)
        assert late_s == about(prefill_s(48) + 11 * DECODE_S)


class TestFaults:
    def test_a_prefill_worker_that_dies_is_replaced_by_the_decode_worker(self, run: Backend) -> None:
        kill = Kill(time_s=0.06, worker_id="w-0")
        rows = run(trace((0.0, 1000, 8), (0.9, 200, 3)), scenario(1, 1, actions=(kill,)))
        ttft_s = 0.06 + 2 * RPC_S + prefill_s(1000)
        check(rows[0], Path.LOCAL, ttft_s=ttft_s, tpot_s=DECODE_S, num_tokens=8)
        assert (rows[1].outcome, rows[1].path) == (DONE, Path.LOCAL)

    def test_a_decode_worker_that_dies_in_mid_answer_ends_it(self, run: Backend) -> None:
        kill = Kill(time_s=0.4, worker_id="w-1")
        rows = run(trace((0.0, 200, 40), (0.7, 200, 3)), scenario(1, 1, actions=(kill,)))
        assert [row.outcome for row in rows] == [FAILED, REJECTED]
        assert rows[0].ttft_s == about(prefill_s(200) + 2 * RPC_S)

    def test_a_stall_costs_its_time(self, run: Backend) -> None:
        stall = Stall(time_s=0.25, worker_id="w-1", duration_s=0.4)
        (row,) = run(trace((0.0, 200, 8)), scenario(1, 1, actions=(stall,)))
        tpot_s = (HANDOFF_S + 7 * DECODE_S + 0.4) / 7
        check(row, Path.REMOTE_EARLY, ttft_s=prefill_s(200) + 2 * RPC_S, tpot_s=tpot_s, num_tokens=8)

    def test_a_prefill_worker_that_is_late_is_given_up(self, run: Backend) -> None:
        stall = Stall(time_s=0.0, worker_id="w-0", duration_s=1.2)
        (row,) = run(trace((0.05, 200, 4)), scenario(1, 1, actions=(stall,), prefill_timeout_s=0.4))
        ttft_s = 0.4 + 2 * RPC_S + prefill_s(200)
        check(row, Path.LOCAL, ttft_s=ttft_s, tpot_s=DECODE_S, num_tokens=4)

    def test_a_decode_worker_that_is_silent_is_given_up(self, run: Backend) -> None:
        stall = Stall(time_s=0.25, worker_id="w-0", duration_s=1.2)
        # One has had tokens when the worker stalls, the other one waits for its first and may try again.
        rows = run(
            trace((0.0, 100, 30), (0.27, 100, 4)),
            scenario(0, 1, actions=(stall,), stall_timeout_s=0.4, prefill_timeout_s=0.4),
        )
        assert [row.outcome for row in rows] == [FAILED, REJECTED]

    def test_kv_that_cannot_be_pulled_is_computed_again(self, run: Backend) -> None:
        fail = FailPulls(time_s=0.0, worker_id="w-1", duration_s=1.0)
        (row,) = run(trace((0.0, 1000, 6)), scenario(1, 1, actions=(fail,)))
        tpot_s = (HANDOFF_S + prefill_s(1001) + 4 * DECODE_S) / 5
        check(row, Path.REMOTE_EARLY, ttft_s=prefill_s(1000) + 2 * RPC_S, tpot_s=tpot_s, num_tokens=6)

    def test_without_decode_workers_nothing_is_answered_but_single_tokens(self, run: Backend) -> None:
        kill = Kill(time_s=0.0, worker_id="w-1")
        rows = run(trace((0.2, 100, 5), (0.3, 100, 1)), scenario(1, 1, actions=(kill,)))
        assert [(row.outcome, row.path) for row in rows] == [(REJECTED, Path.NONE), (DONE, Path.PREFILL_ONLY)]


def test_a_bursty_trace_has_the_same_latencies() -> None:
    what, cluster = bursts(), scenario(2, 2)
    simulated, real = run_simulator(what, cluster), run_mock_cluster(what, cluster)
    assert Counter(row.outcome for row in real) == {DONE: len(what.requests)}
    assert Counter(row.path for row in simulated) == Counter(row.path for row in real)
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        for percent in (50, 90):
            values_s = [[getattr(row, name) for row in rows] for rows in (simulated, real)]
            ours_s, theirs_s = (float(np.nanpercentile(column, percent)) for column in values_s)
            print(f"{name} p{percent}: simulated {ours_s:.4f}, real {theirs_s:.4f}")
            assert ours_s == pytest.approx(theirs_s, rel=0.15), f"{name} p{percent}"


def bursts() -> Trace:
    """60 requests in six bursts of unlike size."""
    rng = np.random.default_rng(3)
    rows = []
    for burst, num_requests in enumerate((4, 16, 8, 18, 4, 10)):
        for since_s in np.sort(rng.uniform(0, 0.15, num_requests)):
            prompt, output = int(rng.integers(50, 1200)), int(rng.integers(1, 25))
            rows.append((1.4 * burst + float(since_s), prompt, output))
    return trace(*rows)
