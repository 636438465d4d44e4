"""What faults do to simulated requests: who is tried next, what it costs, what the client gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from core.request import Path
from core.types import Role
from simulator.actions import Action, FailPulls, Kill, RemoveWorker, SlowLink, Stall, SwitchRole
from simulator.result import Outcome, SimulationResult
from simulator.simulation import simulate
from simulator.spec import ClusterSpec
from simulator.traces.trace import Trace, TraceRequest
from tests.unit.simulated import ROOMY, CheckedSimulation, cluster, group, run, trace

ROUTER_S, RPC_S, HANDOFF_S = 0.004, 0.0005, 0.001
DONE, REJECTED, FAILED = Outcome.DONE, Outcome.REJECTED, Outcome.FAILED
LIVE = 1e-6
"""A moment, for events that must come just before or after another."""


def prefill_s(num_tokens: int) -> float:
    return 0.010 + 0.0001 * num_tokens


def ttft_s(num_tokens: int) -> float:
    return ROUTER_S + RPC_S + prefill_s(num_tokens) + RPC_S


def only(result: SimulationResult) -> tuple[str, str]:
    """Outcome and path of the one request."""
    return str(result.requests.outcome[0]), str(result.requests.path[0])


def who_works(spec: ClusterSpec, what: Trace, at_s: float, role: Role) -> str:
    """The worker of a role that has the one request at a time; the same seed picks it again."""
    simulation = CheckedSimulation(what, spec)
    simulation.run_to(at_s)
    (busy,) = (worker for worker in simulation.cluster.workers() if worker.role is role and worker.legs)
    return busy.worker_id


class TestKilledPrefillWorker:
    def test_the_prompt_goes_to_another_one(self) -> None:
        spec, what = cluster(2, 1), trace((0.0, 100, 3))
        busy = who_works(spec, what, 0.01, Role.PREFILL)
        result = run(what, spec, Kill(time_s=0.01, worker_id=busy))
        assert only(result) == (DONE, Path.REMOTE_EARLY)
        # Known one way later, and there again after one more.
        assert result.requests.ttft_s == pytest.approx([0.01 + RPC_S + RPC_S + prefill_s(100) + RPC_S])

    def test_the_decode_worker_prefills_if_there_is_no_other_one(self) -> None:
        result = run(trace((0.0, 100, 3)), cluster(1, 1), Kill(time_s=0.01, worker_id="w-0"))
        assert only(result) == (DONE, Path.LOCAL)
        assert result.requests.ttft_s == pytest.approx([0.01 + RPC_S + RPC_S + prefill_s(100) + RPC_S])

    def test_three_deaths_are_enough(self) -> None:
        what, spec = trace((0.0, 500, 3)), cluster(4, 1, prefill_timeout_s=0.1)
        result = run(what, spec, *[Stall(time_s=0.0, worker_id=f"w-{n}", duration_s=30.0) for n in range(4)])
        assert only(result) == (DONE, Path.LOCAL)
        assert result.requests.ttft_s[0] > 0.3

    def test_an_answer_of_one_token_is_tried_three_times(self) -> None:
        stalls = [Stall(time_s=0.0, worker_id=f"w-{n}", duration_s=30.0) for n in range(4)]
        what = trace((0.0, 10, 1))
        two = run(what, cluster(3, 1, prefill_timeout_s=0.1), *stalls[:2])
        assert only(two) == (DONE, Path.PREFILL_ONLY)
        result = run(what, cluster(4, 1, prefill_timeout_s=0.1), *stalls)
        assert only(result) == (REJECTED, Path.NONE)

    def test_kv_that_dies_with_it_is_computed_again(self) -> None:
        spec, what = cluster(1, 1), trace((0.0, 500, 3))
        pulled_at_s = ttft_s(500) + RPC_S + HANDOFF_S + 0.02
        result = run(what, spec, Kill(time_s=pulled_at_s, worker_id="w-0"))
        assert only(result) == (DONE, Path.REMOTE_EARLY)
        assert result.num_recomputed == 1
        alone = run(what, spec)
        longer_s = result.requests.e2e_s[0] - alone.requests.e2e_s[0]
        assert longer_s == pytest.approx(prefill_s(501) - 0.006)

    def test_kv_that_died_on_the_way_of_the_answer_is_not_pulled_from_the_next_start(self) -> None:
        spec = cluster(1, 1, group_settings={"startup_s": 0.0})
        killed_at_s = ttft_s(100) - RPC_S / 2
        result = run(trace((0.0, 100, 3)), spec, Kill(time_s=killed_at_s, worker_id="w-0"))
        assert only(result) == (DONE, Path.REMOTE_EARLY)
        assert result.num_recomputed == 1
        assert np.isnan(result.requests.transfer_s).all()


class TestLatePrefill:
    def test_a_stalled_worker_is_given_up_after_the_prefill_timeout(self) -> None:
        spec = cluster(1, 1, prefill_timeout_s=0.5)
        result = run(trace((0.0, 100, 3)), spec, Stall(time_s=0.0, worker_id="w-0", duration_s=9.0))
        assert only(result) == (DONE, Path.LOCAL)
        assert result.requests.ttft_s == pytest.approx([ROUTER_S + 2 * RPC_S + 0.5 + prefill_s(100) + RPC_S])

    def test_the_stall_timeout_is_none_of_its_business(self) -> None:
        spec = cluster(1, 1, stall_timeout_s=0.5)
        result = run(trace((0.0, 100, 3)), spec, Stall(time_s=0.0, worker_id="w-0", duration_s=9.0))
        assert only(result) == (DONE, Path.REMOTE_EARLY)
        assert result.requests.ttft_s == pytest.approx([9.0 + prefill_s(100) + RPC_S])

    def test_an_answer_that_crosses_the_timeout_leaves_nothing_pinned(self) -> None:
        # The answer is on its way back when the router gives up on it.
        spec = cluster(1, 1, prefill_timeout_s=prefill_s(100) + RPC_S / 2)
        simulation = CheckedSimulation(trace((0.0, 100, 3)), spec)
        assert only(simulation.run()) == (DONE, Path.LOCAL)
        simulation.assert_nothing_is_left(after_s=1.0)


class TestKilledDecodeWorker:
    def test_before_its_first_token_another_one_goes_on(self) -> None:
        spec, what = cluster(1, 2), trace((0.0, 500, 4))
        at_s = ttft_s(500) + RPC_S + HANDOFF_S + 0.02
        busy = who_works(spec, what, at_s, Role.DECODE)
        result = run(what, spec, Kill(time_s=at_s, worker_id=busy))
        assert only(result) == (DONE, Path.REMOTE_EARLY)
        # The handle is used up: the other one computes the prompt and the token that is out already.
        assert result.requests.ttft_s == pytest.approx([ttft_s(500)])
        assert result.requests.e2e_s == pytest.approx([at_s + 2 * RPC_S + prefill_s(501) + 2 * 0.006 + RPC_S])

    def test_its_source_is_freed_by_the_lease_only(self) -> None:
        worker = {"worker": replace(ROOMY, lease_s=5.0)}
        spec, what = cluster(1, 1, group_settings=worker, restart=False), trace((0.0, 1000, 4))
        simulation = CheckedSimulation(what, spec, [Kill(time_s=0.2, worker_id="w-1")])
        simulation.run()
        source = simulation.cluster.worker("w-0")
        assert source is not None
        simulation.settle(4.0)
        assert source.load().num_pinned == 1
        simulation.assert_nothing_is_left(after_s=1.2)

    def test_after_its_first_token_the_request_fails(self) -> None:
        result = run(trace((0.0, 100, 50)), cluster(1, 1), Kill(time_s=0.2, worker_id="w-1"))
        assert only(result) == (FAILED, Path.REMOTE_EARLY)
        assert np.isnan(result.requests.e2e_s).all()
        num_decoded = int((0.2 - ttft_s(100) - RPC_S - HANDOFF_S - 0.012) / 0.006)
        assert result.requests.output_tokens.tolist() == [1 + num_decoded]
        assert result.requests.ttft_s == pytest.approx([ttft_s(100)])

    def test_its_promise_of_room_dies_with_it(self) -> None:
        spec, what = cluster(1, 2), trace((0.0, 100, 3))
        promised = "w-1" if who_works(spec, what, 0.0275, Role.DECODE) == "w-1" else "w-2"
        result = run(what, spec, Kill(time_s=0.01, worker_id=promised))
        assert only(result) == (DONE, Path.REMOTE)
        assert result.requests.ttft_s[0] > ttft_s(100)

    def test_without_another_one_the_request_is_an_error(self) -> None:
        for restart in (False, True):
            spec = cluster(1, 1, restart=restart)
            early = run(trace((0.0, 1000, 4)), spec, Kill(time_s=0.15, worker_id="w-1"))
            assert only(early) == (FAILED, Path.REMOTE_EARLY)
            none = run(trace((0.5, 1000, 4)), spec, Kill(time_s=0.1, worker_id="w-1"))
            assert only(none) == (REJECTED, Path.NONE)


class TestDeathOfAll:
    @pytest.mark.parametrize("restart", [True, False])
    def test_every_request_ends(self, restart: bool) -> None:
        what = trace(*[(0.1 * n, 100, 20) for n in range(100)])
        kills = [Kill(time_s=2.0, worker_id=f"w-{n}") for n in range(4)]
        result = run(what, cluster(2, 2, restart=restart), *kills)
        outcomes = result.requests.outcome
        assert (outcomes[:18] == DONE).all()
        assert (outcomes[20:49] == REJECTED).all()
        assert (outcomes[61:] == (DONE if restart else REJECTED)).all()

    def test_a_worker_that_comes_back_starts_empty_and_is_killed_again(self) -> None:
        kills = [Kill(time_s=1.0, worker_id="w-1"), Kill(time_s=6.0, worker_id="w-1")]
        what = trace(*[(0.5 + n, 100, 2) for n in range(12)])
        result = run(what, cluster(1, 1), *kills)
        assert [event.kind for event in result.events] == ["kill", "start", "kill", "start"]
        rejected = [n for n, outcome in enumerate(result.requests.outcome) if outcome == REJECTED]
        assert rejected == [1, 2, 3, 6, 7, 8]


class TestStalledDecodeWorker:
    def test_a_short_stall_only_costs_its_time(self) -> None:
        spec, what = cluster(1, 1, stall_timeout_s=3.0), trace((0.0, 100, 50))
        plain = run(what, spec)
        result = run(what, spec, Stall(time_s=0.2, worker_id="w-1", duration_s=2.0))
        assert only(result) == (DONE, Path.REMOTE_EARLY)
        assert result.requests.e2e_s[0] - plain.requests.e2e_s[0] == pytest.approx(2.0)

    def test_a_long_one_fails_whom_it_has_answered_and_moves_the_others(self) -> None:
        spec = cluster(0, 1, stall_timeout_s=2.0)
        stall = Stall(time_s=0.1, worker_id="w-0", duration_s=9.0)
        result = run(trace((0.0, 100, 50), (0.2, 100, 5)), spec, stall)
        # The second one has nowhere else to go.
        assert result.requests.outcome.tolist() == [FAILED, REJECTED]
        spec, stalls = cluster(0, 2, stall_timeout_s=2.0), []
        stalls = [Stall(time_s=0.0, worker_id="w-0", duration_s=9.0)]
        result = run(trace(*[(0.1, 100, 5)] * 6), spec, *stalls)
        assert (result.requests.outcome == DONE).all()
        late = result.requests.ttft_s > 2.0
        assert 0 < late.sum() < 6

    def test_a_request_that_comes_late_in_a_stall_has_its_own_patience(self) -> None:
        spec = cluster(0, 1, stall_timeout_s=2.0)
        stall = Stall(time_s=0.0, worker_id="w-0", duration_s=2.5)
        result = run(trace((1.5, 100, 5)), spec, stall)
        assert only(result) == (DONE, Path.LOCAL)
        assert result.requests.ttft_s == pytest.approx([1.0 + prefill_s(100) + RPC_S])

    def test_a_request_that_comes_after_the_first_timeout_does_not_wait_for_the_end_of_a_stall(self) -> None:
        spec = cluster(0, 1, stall_timeout_s=2.0)
        result = simulate(
            trace((5.0, 100, 5)), spec, actions=[Stall(time_s=0.0, worker_id="w-0", duration_s=1e9)]
        )
        assert only(result) == (REJECTED, Path.NONE)
        assert result.simulated_s == pytest.approx(7.0, abs=0.1)

    def test_two_stalls_in_a_row_are_one(self) -> None:
        spec = cluster(0, 1, stall_timeout_s=2.0)
        stalls = [Stall(time_s=t, worker_id="w-0", duration_s=1.5) for t in (0.1, 0.3)]
        result = run(trace((0.0, 100, 50)), spec, *stalls)
        assert only(result) == (FAILED, Path.LOCAL)
        assert result.simulated_s == pytest.approx(2.1)

    def test_a_queue_longer_than_the_stall_timeout_is_given_up_too(self) -> None:
        one_by_one = {"worker": replace(ROOMY, max_num_seqs=1)}
        spec = cluster(0, 1, group_settings=one_by_one, stall_timeout_s=1.0)
        result = run(trace((0.0, 10, 300), (0.1, 10, 2)), spec)
        assert result.requests.outcome.tolist() == [DONE, REJECTED]

    def test_kv_of_who_waits_for_it_is_freed_at_its_source_at_once(self) -> None:
        spec = cluster(1, 1, stall_timeout_s=2.0)
        simulation = CheckedSimulation(
            trace((0.0, 100, 5)), spec, [Stall(time_s=0.01, worker_id="w-1", duration_s=9.0)]
        )
        assert only(simulation.run()) == (FAILED, Path.REMOTE_EARLY)
        simulation.assert_nothing_is_left(after_s=0.1)


class TestTransfers:
    def test_a_failed_pull_costs_its_time_and_the_prompt_again(self) -> None:
        spec, what = cluster(1, 1), trace((0.0, 200, 3))
        plain = run(what, spec)
        result = run(what, spec, FailPulls(time_s=0.0, worker_id="w-1", duration_s=1.0))
        assert only(result) == (DONE, Path.REMOTE_EARLY)
        assert result.num_recomputed == 1
        assert result.requests.ttft_s == plain.requests.ttft_s
        longer_s = result.requests.e2e_s[0] - plain.requests.e2e_s[0]
        assert longer_s == pytest.approx(prefill_s(201) - 0.006)

    def test_a_slow_link_slows_pulls_until_it_is_over(self) -> None:
        slow = SlowLink(time_s=0.0, worker_id="w-1", duration_s=1.0, factor=10.0)
        # One that ends earlier does not end the other.
        shorter = replace(slow, time_s=0.1, duration_s=0.1)
        what = trace((0.0, 100, 2), (0.5, 100, 2), (1.5, 100, 2))
        result = run(what, cluster(1, 1), slow, shorter)
        fast_s = HANDOFF_S + 0.002 + 0.01
        assert result.requests.transfer_s == pytest.approx([fast_s + 0.09, fast_s + 0.09, fast_s])

    def test_a_worker_does_not_pull_from_itself(self) -> None:
        # The prefill worker has become the only decode worker when the other one dies.
        spec = cluster(1, 1, heartbeat_s=0.02, role_switch_s=0.01)
        actions: Sequence[Action] = [
            SwitchRole(time_s=0.03, worker_id="w-0", role=Role.DECODE),
            Kill(time_s=0.05, worker_id="w-1"),
        ]
        result = run(trace((0.0, 1000, 3)), spec, *actions)
        assert only(result) == (DONE, Path.REMOTE)
        assert result.num_recomputed == 1
        assert np.isnan(result.requests.transfer_s).all()


class TestRefusals:
    def test_a_full_prefill_worker_sends_prompts_elsewhere(self) -> None:
        tiny = replace(ROOMY, max_num_seqs=1)
        groups = group(1, 0, shape="p", worker=tiny), group(0, 1, shape="d")
        result = run(trace(*[(0.0, 100, 2)] * 8), ClusterSpec(groups=groups))
        assert (result.requests.outcome == DONE).all()
        assert result.requests.path.tolist().count(Path.LOCAL) == 4

    def test_a_full_cluster_refuses(self) -> None:
        tiny = {"worker": replace(ROOMY, max_num_seqs=1)}
        result = run(trace(*[(0.0, 100, 20)] * 8), cluster(0, 1, group_settings=tiny))
        assert result.requests.outcome.tolist() == [DONE] * 4 + [REJECTED] * 4

    def test_a_draining_worker_refuses_what_routers_still_send(self) -> None:
        removed = RemoveWorker(time_s=0.5, worker_id="w-0")
        result = run(trace((0.6, 100, 3)), cluster(1, 1), removed)
        assert only(result) == (DONE, Path.LOCAL)

    def test_a_pinned_prompt_is_not_forgotten_when_the_request_fails(self) -> None:
        prompt = TraceRequest(arrival_s=0.0, prompt_tokens=100, output_tokens=4)
        result = run(trace(prompt), cluster(1, 1, restart=False), Kill(time_s=0.0245 + LIVE, worker_id="w-1"))
        assert only(result) == (REJECTED, Path.NONE)
