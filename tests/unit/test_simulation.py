"""Simulations whose every time can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from core.errors import ConfigError
from core.request import Path
from core.types import Role
from simulator.actions import AddWorker, RemoveWorker, SwitchRole
from simulator.result import Outcome
from simulator.simulation import simulate
from simulator.spec import ClusterSpec
from simulator.traces.trace import Trace, TraceRequest
from tests.unit.simulated import LINK, ROOMY, cluster, group, run, trace

# The costs of tests/unit/simulated.py and of ClusterSpec, in seconds.
ROUTER_S, RPC_S, HANDOFF_S = 0.004, 0.0005, 0.001
LINK_LATENCY_S, LINK_S_PER_TOKEN = 0.002, 0.0001
DECODE_S = 0.006


def prefill_s(num_tokens: int) -> float:
    return 0.010 + 0.0001 * num_tokens


def decode_s(batch: int) -> float:
    return 0.005 + 0.001 * batch


def ttft_s(num_tokens: int) -> float:
    return ROUTER_S + RPC_S + prefill_s(num_tokens) + RPC_S


def handoff_s(num_tokens: int) -> float:
    """From the first token at the router to the decode worker's first step."""
    return RPC_S + HANDOFF_S + LINK_LATENCY_S + LINK_S_PER_TOKEN * num_tokens


class TestOneRequest:
    def test_prefilled_remotely(self) -> None:
        result = run(trace((1.0, 100, 5)), cluster(1, 1))
        table = result.requests
        first_gap_s = handoff_s(100) + DECODE_S + RPC_S
        assert table.outcome.tolist() == [Outcome.DONE]
        assert table.path.tolist() == [Path.REMOTE_EARLY]
        assert table.ttft_s == pytest.approx([ttft_s(100)])
        assert table.tpot_s == pytest.approx([(first_gap_s + 3 * DECODE_S) / 4])
        assert table.e2e_s == pytest.approx([ttft_s(100) + first_gap_s + 3 * DECODE_S])
        assert table.transfer_s == pytest.approx([handoff_s(100) - RPC_S])
        assert table.prefill_queue_s == pytest.approx([0.0])
        assert table.output_tokens.tolist() == [5]
        gaps_s = np.repeat(result.gaps.gap_s, result.gaps.weight)
        assert gaps_s == pytest.approx([first_gap_s, DECODE_S, DECODE_S, DECODE_S])

    def test_prefilled_by_the_decode_worker_where_nobody_else_is(self) -> None:
        result = run(trace((0.0, 100, 5)), cluster(0, 1))
        table = result.requests
        assert table.path.tolist() == [Path.LOCAL]
        assert table.ttft_s == pytest.approx([ttft_s(100)])
        assert table.tpot_s == pytest.approx([DECODE_S])
        assert table.e2e_s == pytest.approx([ttft_s(100) + 4 * DECODE_S])
        assert np.isnan(table.transfer_s).all()

    def test_an_answer_of_one_token(self) -> None:
        table = run(trace((0.0, 100, 1)), cluster(1, 1)).requests
        assert table.path.tolist() == [Path.PREFILL_ONLY]
        assert table.ttft_s == table.e2e_s == pytest.approx([ttft_s(100)])
        assert np.isnan(table.tpot_s).all()

    def test_an_answer_of_one_token_from_a_decode_worker(self) -> None:
        table = run(trace((0.0, 100, 1)), cluster(0, 1)).requests
        assert table.path.tolist() == [Path.PREFILL_ONLY]
        assert table.e2e_s == pytest.approx([ttft_s(100)])

    def test_a_long_prompt_is_prefilled_in_chunks_whose_times_add_up(self) -> None:
        table = run(trace((0.0, 1200, 2)), cluster(1, 1)).requests
        # Three steps of at most 512 tokens; the two that end no prompt cost a decode step's constant.
        assert table.ttft_s == pytest.approx([ttft_s(1200) + 2 * 0.005])

    def test_without_a_promise_of_room_the_first_token_waits_for_the_decode_worker(self) -> None:
        spec = ClusterSpec(
            groups=(group(1, 0, shape="p"), group(0, 1, shape="d", worker=replace(ROOMY, num_kv_blocks=50)))
        )
        # The second one's 101 tokens do not fit beside the first one's 100 while they are promised.
        table = run(trace((0.0, 100, 2), (0.0, 100, 2)), spec).requests
        assert table.path.tolist() == [Path.REMOTE_EARLY, Path.REMOTE]
        assert table.ttft_s[1] > table.ttft_s[0] + handoff_s(100)

    def test_nothing_arrives(self) -> None:
        result = simulate(Trace(name="none", requests=()), cluster(1, 1))
        assert len(result.requests.ttft_s) == len(result.gaps.gap_s) == 0
        assert result.gpu_seconds == result.simulated_s == 0.0


class TestSharing:
    def test_of_prompts_that_come_together_the_second_waits_for_the_first_ones_step(self) -> None:
        table = run(trace((0.0, 100, 1), (0.0, 200, 1)), cluster(1, 1)).requests
        assert table.ttft_s[0] == pytest.approx(ttft_s(100))
        assert table.ttft_s[1] == pytest.approx(ttft_s(200) + prefill_s(100))
        assert table.prefill_queue_s == pytest.approx([0.0, prefill_s(100)])

    def test_a_prompt_that_comes_while_another_is_prefilled_waits_for_its_step(self) -> None:
        table = run(trace((0.0, 100, 1), (0.005, 100, 1), (0.006, 50, 1)), cluster(1, 1)).requests
        assert table.ttft_s[0] == pytest.approx(ttft_s(100))
        # Both wait for the same step, and share the next one.
        together_s = prefill_s(150)
        assert table.ttft_s[1] == pytest.approx(ROUTER_S + 2 * RPC_S + prefill_s(100) - 0.005 + together_s)
        assert table.prefill_queue_s[1:] == pytest.approx([prefill_s(100) - 0.005, prefill_s(100) - 0.006])

    def test_two_prefill_workers_take_one_prompt_each(self) -> None:
        table = run(trace((0.0, 100, 1), (0.0, 100, 1)), cluster(2, 1)).requests
        assert table.ttft_s == pytest.approx([ttft_s(100)] * 2)

    def test_a_batch_slows_each_decode(self) -> None:
        table = run(trace((0.0, 100, 101), (0.0, 100, 101)), cluster(2, 1)).requests
        alone = run(trace((0.0, 100, 101)), cluster(2, 1)).requests
        # Both pulls come to one worker, the second after the first.
        assert alone.tpot_s == pytest.approx([(handoff_s(100) + RPC_S + 100 * decode_s(1)) / 100])
        assert table.tpot_s == pytest.approx([decode_s(2)] * 2, rel=0.04)
        assert (table.tpot_s > decode_s(2)).all()

    def test_a_prompt_on_a_decode_worker_delays_who_decodes_there_by_its_step(self) -> None:
        result = run(trace((0.0, 10, 50), (0.1, 200, 2)), cluster(0, 1))
        gaps_s = np.repeat(result.gaps.gap_s, result.gaps.weight)
        assert gaps_s.max() == pytest.approx(prefill_s(200) + 0.001)

    def test_pulls_from_one_worker_go_one_after_another(self) -> None:
        table = run(trace((0.0, 1000, 2), (0.0, 1000, 2)), cluster(2, 1)).requests
        assert table.ttft_s[0] == table.ttft_s[1]
        alone_s = HANDOFF_S + LINK_LATENCY_S + 1000 * LINK_S_PER_TOKEN
        assert table.transfer_s == pytest.approx([alone_s, alone_s + 1000 * LINK_S_PER_TOKEN])

    def test_pulls_between_other_workers_do_not_wait(self) -> None:
        table = run(trace((0.0, 1000, 2), (0.0, 1000, 2)), cluster(2, 2)).requests
        alone_s = HANDOFF_S + LINK_LATENCY_S + 1000 * LINK_S_PER_TOKEN
        assert table.transfer_s == pytest.approx([alone_s, alone_s])

    def test_the_slower_of_two_links_sets_the_pace(self) -> None:
        slow = replace(LINK, bytes_per_s=LINK.bytes_per_s / 4, latency_s=0.01)
        spec = ClusterSpec(groups=(group(1, 0, shape="p", link=slow), group(0, 1, shape="d")))
        table = run(trace((0.0, 1000, 2)), spec).requests
        assert table.transfer_s == pytest.approx([HANDOFF_S + 0.01 + 4000 * LINK_S_PER_TOKEN])


class TestPrefixCache:
    def test_a_repeated_prompt_shortens_its_prefill_and_its_pull(self) -> None:
        prompt = TraceRequest(
            arrival_s=0.0, prompt_tokens=102, output_tokens=3, block_hashes=tuple(range(25))
        )
        worker = {"worker": replace(ROOMY, hash_block_tokens=4)}
        again = replace(prompt, arrival_s=1.0)
        table = run(trace(prompt, again), cluster(1, 1, group_settings=worker)).requests
        assert table.cached_tokens.tolist() == [0, 100]
        assert table.ttft_s == pytest.approx([ttft_s(102), ttft_s(2)])
        # The decode worker's own cache holds all but the last two tokens of the prompt.
        saved_s = 100 * LINK_S_PER_TOKEN
        assert table.transfer_s[0] - table.transfer_s[1] == pytest.approx(saved_s)

    def test_kv_that_the_decode_worker_has_in_full_is_not_pulled(self) -> None:
        prompt = TraceRequest(
            arrival_s=0.0, prompt_tokens=100, output_tokens=3, block_hashes=tuple(range(25))
        )
        table = run(trace(prompt, replace(prompt, arrival_s=1.0)), cluster(1, 1)).requests
        assert np.isnan(table.transfer_s).tolist() == [False, True]
        assert table.e2e_s[1] == pytest.approx(ttft_s(4) + RPC_S + 2 * DECODE_S + RPC_S)
        # A prompt's last token is always computed, so its last piece is never taken from the cache.
        assert table.cached_tokens.tolist() == [0, 96]


class TestCluster:
    def test_gpu_seconds_count_from_the_decision_to_start_to_the_end_of_the_last_request(self) -> None:
        spec = cluster(1, 1, group_settings={"gpus_per_worker": 2.0})
        what = trace((0.0, 10, 1), (10.0, 10, 1))
        plain = simulate(what, spec)
        assert plain.gpu_seconds == pytest.approx(4 * plain.simulated_s)
        added = simulate(what, spec, actions=[AddWorker(time_s=4.0, shape="w", role=Role.DECODE)])
        assert added.gpu_seconds == pytest.approx(4 * added.simulated_s + 2 * (added.simulated_s - 4.0))
        assert [(event.kind, event.time_s) for event in added.events] == [("start", 7.0)]
        removed = simulate(what, spec, actions=[RemoveWorker(time_s=4.5, worker_id="w-0")])
        # It leaves with its heartbeat.
        assert removed.gpu_seconds == pytest.approx(4 * removed.simulated_s - 2 * (removed.simulated_s - 5.0))

    def test_a_worker_serves_once_it_has_started_and_reported(self) -> None:
        added = AddWorker(time_s=0.5, shape="w", role=Role.PREFILL)
        arrivals = [(float(n), 100, 2) for n in range(8)]
        paths = run(trace(*arrivals), cluster(0, 1), added).requests.path.tolist()
        assert paths == [Path.LOCAL] * 4 + [Path.REMOTE_EARLY] * 4

    def test_a_role_switch_takes_effect_without_waiting_for_a_heartbeat(self) -> None:
        arrivals = [(0.2, 100, 2), (0.58, 100, 2), (0.6, 100, 2)]  # a router takes 4 ms to decide
        switch = SwitchRole(time_s=0.5, worker_id="w-0", role=Role.PREFILL)
        result = run(trace(*arrivals), cluster(0, 2), switch)
        assert result.requests.path.tolist() == [Path.LOCAL, Path.LOCAL, Path.REMOTE_EARLY]
        assert result.num_role_switches == 1
        assert [(event.kind, event.time_s) for event in result.events] == [("role_switch", 0.6)]

    def test_a_switch_to_a_role_the_shape_may_not_take_is_ignored_and_noted(self) -> None:
        spec = ClusterSpec(groups=(group(0, 2, allowed_roles=frozenset({Role.DECODE})),))
        result = run(trace((3.0, 10, 2)), spec, SwitchRole(time_s=0.5, worker_id="w-0", role=Role.PREFILL))
        assert result.num_role_switches == 0
        assert [event.kind for event in result.events] == ["ignored"]

    def test_a_removed_worker_finishes_what_it_has(self) -> None:
        removed = RemoveWorker(time_s=0.05, worker_id="w-1")
        result = run(trace((0.0, 100, 500), (4.0, 10, 2)), cluster(1, 1), removed)
        assert result.requests.outcome.tolist() == [Outcome.DONE, Outcome.REJECTED]

    def test_a_promise_of_room_is_kept_by_a_worker_that_is_on_its_way_out(self) -> None:
        removed = RemoveWorker(time_s=0.01, worker_id="w-1")  # while the prompt is prefilled
        result = run(trace((0.0, 100, 3)), cluster(1, 1), removed)
        assert result.requests.outcome.tolist() == [Outcome.DONE]
        assert result.requests.path.tolist() == [Path.REMOTE_EARLY]

    def test_a_router_hears_that_a_worker_has_become_idle(self) -> None:
        # The second router's request ends beside the first router's, which ends before the heartbeat.
        early = (0.0, 1000, 80), (0.0, 10, 20)
        added = AddWorker(time_s=0.0, shape="w", role=Role.DECODE)
        late = [(6.0, 10, 100)] * 4
        table = run(trace(*early, *late), cluster(0, 1, num_routers=2), added).requests
        # To both routers both workers are idle: each gets one request from each.
        assert table.tpot_s[2:] == pytest.approx([decode_s(2)] * 4, rel=0.04)

    @pytest.mark.parametrize(
        ("action", "message"),
        [
            (AddWorker(time_s=0.0, shape="x", role=Role.DECODE), "no shape 'x'"),
            (AddWorker(time_s=0.0, shape="d", role=Role.PREFILL), "may not take the role 'prefill'"),
        ],
    )
    def test_a_worker_that_cannot_be_is_an_error(self, action: AddWorker, message: str) -> None:
        spec = ClusterSpec(groups=(group(0, 1, shape="d", allowed_roles=frozenset({Role.DECODE})),))
        with pytest.raises(ConfigError, match=message):
            simulate(trace((0.0, 1, 1)), spec, actions=[action])


class TestLimits:
    def test_what_never_fits_is_refused_at_once(self) -> None:
        small = {"worker": replace(ROOMY, num_kv_blocks=10)}
        result = run(trace((0.0, 41, 2), (0.1, 10, 2)), cluster(1, 1, group_settings=small))
        assert result.requests.outcome.tolist() == [Outcome.REJECTED, Outcome.DONE]
        assert result.requests.path.tolist() == [Path.NONE, Path.REMOTE_EARLY]

    def test_an_answer_that_outgrows_the_decode_worker_fails_after_its_first_token(self) -> None:
        small = {"worker": replace(ROOMY, num_kv_blocks=10)}
        table = run(trace((0.0, 30, 12)), cluster(1, 1, group_settings=small)).requests
        assert table.outcome.tolist() == [Outcome.FAILED]
        assert table.output_tokens.tolist() == [1]

    def test_preempted_requests_are_answered_in_full(self) -> None:
        tight = {"worker": replace(ROOMY, num_kv_blocks=12)}
        result = run(trace((0.0, 10, 30), (0.0, 10, 30)), cluster(0, 1, group_settings=tight))
        assert result.num_preemptions > 0
        assert result.requests.output_tokens.tolist() == [30, 30]
        gaps_s = np.repeat(result.gaps.gap_s, result.gaps.weight)
        assert len(gaps_s) == 58
        assert gaps_s.sum() == pytest.approx((result.requests.e2e_s - result.requests.ttft_s).sum())
