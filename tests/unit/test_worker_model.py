"""The worker model: batching, KV memory and failures, on a clock the tests turn by hand."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import Draining, Overloaded, WorkerLost
from core.performance_model import H200_LLAMA_8B_FP8, KvLink, LinearStepTime, PrefillChunk, StepTime
from core.types import WorkerLoad
from core.worker_events import (
    Finished,
    KvPull,
    Prefilled,
    SequenceSpec,
    Step,
    StepResult,
    WorkerModelConfig,
)
from core.worker_model import WorkerModel

SMALL = WorkerModelConfig(
    num_kv_blocks=16,
    block_size_tokens=4,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    lease_s=5.0,
)
ONE_MS = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.0,
    prefill_base_ms=1.0,
    decode_base_ms=1.0,
    decode_ms_per_seq=0.0,
    decode_ms_per_kv_token=0.0,
)


def spec(request_id: str, num_prompt_tokens: int, max_tokens: int, **more: Any) -> SequenceSpec:
    return SequenceSpec(
        request_id=request_id, num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, **more
    )


class Driver:
    """Turns the clock of one worker the way a simulator does, and writes down what comes out."""

    def __init__(
        self,
        config: WorkerModelConfig = SMALL,
        step_time: StepTime = ONE_MS,
        *,
        max_decode_steps: int = 1,
        pull_s: float = 0.0105,
    ) -> None:
        self.model = WorkerModel(config, step_time)
        self.now_s = 0.0
        self.token_times_s: dict[str, list[float]] = {}
        self.prefilled: dict[str, Prefilled] = {}
        self.finished: dict[str, Finished] = {}
        self.steps: list[Step] = []
        self.pulls: list[KvPull] = []
        self.unneeded_pulls: list[str] = []
        self.preempted: list[str] = []
        self.expired: list[str] = []
        self.pulls_succeed = True
        self._max_decode_steps = max_decode_steps
        self._pull_s = pull_s
        self._arrivals: list[tuple[float, str, bool]] = []

    def submit(self, *specs: SequenceSpec) -> None:
        with self.event() as model:
            for each in specs:
                model.submit(self.now_s, each)

    def abort(self, request_id: str) -> bool:
        with self.event() as model:
            return model.abort(self.now_s, request_id)

    @contextmanager
    def event(self) -> Iterator[WorkerModel]:
        """Something happens now; it takes part in the next plan, which is made at once if it can be."""
        if self.model.step is not None and (result := self.model.cut_step(self.now_s)):
            self._write_down(result)
        yield self.model
        if self.model.step is None:
            self._plan()

    def run(self, until_s: float = float("inf")) -> None:
        """Runs until nothing is left to happen, or up to a time."""
        while (next_s := self._next_event_s()) is not None and next_s <= until_s:
            self.now_s = next_s
            if self.model.step is not None and self.model.step.end_s == next_s:
                self.steps.append(self.model.step)
                self._write_down(self.model.finish_step(next_s))
                self._plan()
            elif self._arrivals and self._arrivals[0][0] == next_s:
                _, request_id, ok = heapq.heappop(self._arrivals)
                with self.event() as model:
                    model.kv_arrived(next_s, request_id, ok=ok)
            else:
                with self.event() as model:
                    self.expired += model.expire_leases(next_s)
            load = self.load()
            assert 0 <= load.kv_used_blocks <= self.model.config.num_kv_blocks
            assert 0 <= load.num_running <= self.model.config.max_num_seqs
            assert load.num_waiting >= 0
            assert load.waiting_prefill_tokens >= 0
        if until_s < float("inf"):
            self.now_s = until_s

    def load(self) -> WorkerLoad:
        return self.model.load(self.now_s)

    def _next_event_s(self) -> float | None:
        times_s = [self._arrivals[0][0]] if self._arrivals else []
        if self.model.step is not None:
            times_s.append(self.model.step.end_s)
        if (deadline_s := self.model.next_deadline_s()) is not None:
            times_s.append(deadline_s)
        return min(times_s, default=None)

    def _plan(self) -> None:
        plan = self.model.plan_step(self.now_s, self._max_decode_steps)
        for pull in plan.pulls:
            heapq.heappush(self._arrivals, (self.now_s + self._pull_s, pull.request_id, self.pulls_succeed))
        self.pulls += plan.pulls
        self.unneeded_pulls += plan.unneeded_pulls
        self.preempted += plan.preempted

    def _write_down(self, result: StepResult) -> None:
        for request_id in result.decoded:
            self.token_times_s[request_id] += result.ends_s
        for first in result.prefilled:
            self.token_times_s.setdefault(first.request_id, []).append(self.now_s)
            self.prefilled.setdefault(first.request_id, first)
        for finished in result.finished:
            assert finished.request_id not in self.finished
            assert finished.num_tokens == len(self.token_times_s[finished.request_id])
            self.finished[finished.request_id] = finished


def chunk_sizes(steps: Sequence[Step]) -> list[list[int]]:
    return [[chunk.num_tokens for chunk in step.prefills] for step in steps]


class TestBatching:
    def test_a_lone_request_takes_its_prefill_and_a_step_for_every_further_token(self) -> None:
        driver = Driver(step_time=H200_LLAMA_8B_FP8)
        driver.submit(spec("a", 10, 4))
        driver.run()
        prefill_s = (4.21e-7 * 100 + 0.01518 * 10 + 16.50) / 1e3
        gaps_s = [b - a for a, b in pairwise([0.0, *driver.token_times_s["a"]])]
        decodes_s = [(4.677 + 0.03812 + 2.878e-5 * kv_tokens) / 1e3 for kv_tokens in (10, 11, 12)]
        assert gaps_s == pytest.approx([prefill_s, *decodes_s])

    def test_a_long_prompt_is_prefilled_in_chunks_of_the_token_budget(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 40, 2))
        driver.run()
        assert chunk_sizes(driver.steps) == [[16], [16], [8], []]

    def test_decodes_come_first_and_prefill_gets_the_rest_of_the_budget(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 4, 10), spec("b", 4, 10))
        driver.run(until_s=0.0015)
        driver.submit(spec("c", 20, 2))
        driver.run()
        assert [step.num_decoding for step in driver.steps[1:5]] == [2, 2, 2, 3]
        assert chunk_sizes(driver.steps[1:5]) == [[], [14], [6], []]

    def test_one_step_prefills_several_prompts_and_splits_the_last(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 6, 2), spec("b", 7, 2), spec("c", 9, 2))
        driver.run()
        assert chunk_sizes(driver.steps)[:2] == [[6, 7, 3], [6]]

    def test_no_more_than_max_num_seqs_run_at_once(self) -> None:
        driver = Driver()
        driver.submit(*[spec(f"r{i}", 2, 3) for i in range(6)])
        assert (driver.load().num_running, driver.load().num_waiting) == (4, 2)
        driver.run()
        assert len(driver.finished) == 6

    def test_waiting_requests_start_by_priority_and_then_by_arrival(self) -> None:
        driver = Driver()
        driver.submit(spec("running", 16, 1))
        driver.submit(spec("a", 16, 1), spec("b", 16, 1), spec("urgent", 16, 1, priority=-1))
        driver.run()
        assert list(driver.finished) == ["running", "urgent", "a", "b"]

    def test_a_request_that_lacks_room_is_not_overtaken_by_a_smaller_one(self) -> None:
        driver = Driver()
        driver.submit(spec("big", 40, 5))
        driver.run(until_s=0.0035)
        driver.submit(spec("too-big-now", 40, 1), spec("small", 4, 1))
        driver.run()
        assert list(driver.finished) == ["big", "too-big-now", "small"]

    def test_the_first_token_comes_with_queue_and_prefill_time(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 16, 1))
        driver.submit(spec("b", 32, 1))
        driver.run()
        assert driver.prefilled["b"].queue_s == pytest.approx(0.001)
        assert driver.prefilled["b"].prefill_s == pytest.approx(0.002)

    def test_load_counts_prompt_tokens_until_the_first_token(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 20, 3), spec("b", 10, 3))
        assert driver.load().waiting_prefill_tokens == 30
        driver.run(until_s=0.0025)
        assert driver.load().waiting_prefill_tokens == 0


class TestManyStepsAtOnce:
    def test_a_run_of_decodes_is_planned_up_to_the_next_finish(self) -> None:
        driver = Driver(max_decode_steps=100)
        driver.submit(spec("a", 4, 5), spec("b", 4, 9))
        driver.run()
        assert [len(step.ends_s) for step in driver.steps] == [1, 4, 4]

    def test_an_arrival_cuts_the_run_at_the_next_boundary(self) -> None:
        driver = Driver(max_decode_steps=100)
        driver.submit(spec("a", 4, 20))
        driver.run(until_s=0.0045)
        driver.submit(spec("b", 4, 1))
        assert len(driver.token_times_s["a"]) == 4
        driver.run()
        assert driver.token_times_s["b"] == pytest.approx([0.006])
        assert driver.token_times_s["a"] == pytest.approx([0.001 * i for i in range(1, 21)])

    def test_load_is_exact_between_the_steps_of_a_run(self) -> None:
        one, many = Driver(), Driver(max_decode_steps=100)
        for driver in (one, many):
            driver.submit(spec("a", 5, 30), spec("b", 3, 40))
        for now_ms in range(45):
            one.run(until_s=now_ms / 1e3 + 0.0005)
            many.run(until_s=now_ms / 1e3 + 0.0005)
            assert one.load() == many.load()

    def test_a_run_stops_before_blocks_could_be_lacking(self) -> None:
        driver = Driver(max_decode_steps=100)
        driver.submit(spec("a", 16, 40), spec("b", 16, 40))
        driver.run()
        assert driver.preempted == ["b"]
        assert len(driver.token_times_s["a"]) == len(driver.token_times_s["b"]) == 40


class TestKvMemory:
    def test_blocks_in_use_are_those_of_the_tokens_computed(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 5, 9), spec("b", 3, 12), spec("c", 4, 7))
        for step in range(1, 13):
            driver.run(until_s=0.001 * step + 0.0005)
            live = [("a", 5), ("b", 3), ("c", 4)]
            num_tokens = [
                prompt + len(driver.token_times_s[request_id]) - 1
                for request_id, prompt in live
                if request_id not in driver.finished
            ]
            assert driver.load().kv_used_blocks == sum(-(-tokens // 4) for tokens in num_tokens)

    def test_out_of_blocks_the_last_arrival_is_preempted_and_still_gets_all_its_tokens(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 12, 20), spec("b", 12, 20), spec("c", 12, 20))
        driver.run()
        assert driver.preempted[0] == "c"
        assert "a" not in driver.preempted
        assert {len(times_s) for times_s in driver.token_times_s.values()} == {20}
        assert driver.finished["c"].num_preemptions >= 1

    def test_preemption_takes_the_least_urgent_before_the_last_arrival(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 12, 20, priority=1), spec("b", 12, 20), spec("c", 12, 20))
        driver.run()
        assert driver.preempted[0] == "a"

    def test_a_request_that_can_never_fit_is_refused(self) -> None:
        driver = Driver()
        with pytest.raises(ValueError, match="65 tokens of KV, the worker has 64"):
            driver.submit(spec("a", 60, 6))
        driver.submit(spec("b", 60, 5))
        driver.run()
        assert driver.finished["b"].num_tokens == 5

    def test_everything_is_free_when_nothing_is_left(self) -> None:
        driver = Driver()
        driver.submit(*[spec(f"r{i}", 3 + i, 10) for i in range(8)])
        driver.run()
        assert driver.load().kv_used_blocks == 0
        assert driver.model.drained


class TestPrefixCache:
    def test_a_repeated_prompt_computes_only_what_is_not_cached(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 13, 1, block_hashes=["x", "y", "z"]))
        driver.run()
        driver.submit(spec("b", 13, 1, block_hashes=["x", "y", "z"]))
        driver.run()
        assert driver.prefilled["b"].num_cached_tokens == 12
        assert chunk_sizes(driver.steps) == [[13], [1]]

    def test_the_last_token_is_computed_even_if_its_block_is_cached(self) -> None:
        driver = Driver()
        for request_id in "ab":
            driver.submit(spec(request_id, 12, 1, block_hashes=["x", "y", "z"]))
            driver.run()
        assert driver.prefilled["b"].num_cached_tokens == 8

    def test_a_prefix_is_shared_up_to_the_first_difference_and_held_once(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 9, 30, block_hashes=["x", "y"]))
        driver.submit(spec("b", 9, 30, block_hashes=["x", "other"]))
        driver.run(until_s=0.0015)
        driver.run(until_s=0.0025)
        assert driver.prefilled["b"].num_cached_tokens == 4
        assert driver.load().kv_used_blocks == 3 + 2

    def test_cached_prefixes_give_way_to_running_requests_oldest_first(self) -> None:
        driver = Driver()
        driver.submit(spec("old", 21, 1, block_hashes=[f"old{i}" for i in range(5)]))
        driver.run()
        driver.submit(spec("new", 21, 1, block_hashes=[f"new{i}" for i in range(5)]))
        driver.run()
        driver.submit(spec("big", 40, 1))
        driver.run()
        driver.submit(spec("new2", 21, 1, block_hashes=[f"new{i}" for i in range(5)]))
        driver.run()
        driver.submit(spec("old2", 21, 1, block_hashes=[f"old{i}" for i in range(5)]))
        driver.run()
        assert driver.prefilled["new2"].num_cached_tokens == 20
        assert driver.prefilled["old2"].num_cached_tokens == 4

    def test_known_output_is_cached_for_the_next_turn(self) -> None:
        driver = Driver()
        driver.submit(spec("turn1", 6, 7, block_hashes=["x", "y", "z"]))
        driver.run()
        driver.submit(spec("turn2", 20, 1, block_hashes=["x", "y", "z", "u", "v"]))
        driver.run()
        assert driver.prefilled["turn2"].num_cached_tokens == 12

    def test_hashes_may_name_pieces_of_several_blocks(self) -> None:
        config = WorkerModelConfig(num_kv_blocks=16, block_size_tokens=4, hash_block_tokens=8, max_num_seqs=4)
        driver = Driver(config)
        for request_id in "ab":
            driver.submit(spec(request_id, 20, 1, block_hashes=["x", "y"]))
            driver.run()
        assert driver.prefilled["b"].num_cached_tokens == 16
        assert driver.load().kv_used_blocks == 0


class TestHandoff:
    def test_kept_kv_stays_pinned_until_it_is_released(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 10, 1, keep_kv=True))
        driver.run(until_s=1.0)
        assert driver.finished["a"].pinned_tokens == 10
        assert driver.load().num_pinned == 1
        assert driver.load().kv_used_blocks == 3
        assert driver.model.release(1.0, "a")
        assert not driver.model.release(1.0, "a")
        assert driver.load().kv_used_blocks == 0

    def test_kept_kv_is_freed_when_its_lease_ends(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 10, 1, keep_kv=True))
        driver.run()
        assert driver.expired == ["a"]
        assert driver.now_s == driver.finished["a"].lease_end_s == pytest.approx(5.001)
        assert driver.model.drained

    def test_a_renewed_lease_ends_later_and_never_earlier(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 10, 1, keep_kv=True))
        driver.run(until_s=3.0)
        assert driver.model.renew(3.0, "a", 10.0) == pytest.approx(13.0)
        assert driver.model.renew(3.0, "a", 1.0) == pytest.approx(13.0)
        assert driver.model.renew(3.0, "unknown", 1.0) is None
        driver.run()
        assert driver.now_s == pytest.approx(13.0)

    def test_pinned_kv_keeps_new_requests_out_until_it_is_gone(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 40, 1, keep_kv=True))
        driver.run(until_s=0.5)
        driver.submit(spec("b", 40, 1))
        driver.run(until_s=1.0)
        assert driver.load().num_waiting == 1
        driver.run()
        assert driver.token_times_s["b"][0] > 5.0

    def test_remote_kv_is_pulled_into_blocks_set_aside_and_only_the_rest_is_computed(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 11, 3, remote_tokens=10))
        assert driver.pulls == [KvPull(request_id="a", num_tokens=10)]
        assert driver.load().kv_used_blocks == 3
        assert driver.load().num_waiting == 1
        driver.run()
        assert chunk_sizes(driver.steps) == [[1], [], []]
        assert driver.prefilled["a"].num_cached_tokens == 10
        assert driver.token_times_s["a"] == pytest.approx([0.0115, 0.0125, 0.0135])

    def test_the_last_prompt_token_is_computed_again_if_all_of_them_were_pulled(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 12, 2, remote_tokens=12))
        driver.run()
        assert chunk_sizes(driver.steps) == [[1], []]
        assert driver.prefilled["a"].num_cached_tokens == 11

    def test_others_run_while_kv_is_on_its_way(self) -> None:
        driver = Driver()
        driver.submit(spec("pulled", 12, 2, remote_tokens=12), spec("local", 12, 5))
        driver.run()
        assert list(driver.finished) == ["local", "pulled"]

    def test_a_failed_pull_is_computed_instead(self) -> None:
        driver = Driver()
        driver.pulls_succeed = False
        driver.submit(spec("a", 12, 2, remote_tokens=12))
        driver.run()
        assert chunk_sizes(driver.steps) == [[12], []]
        assert driver.prefilled["a"].num_cached_tokens == 0
        assert driver.finished["a"].num_tokens == 2

    def test_only_what_the_own_cache_lacks_is_pulled(self) -> None:
        driver = Driver()
        hashes = ["x", "y", "z"]
        driver.submit(spec("warm", 9, 1, block_hashes=hashes[:2]))
        driver.run()
        driver.submit(spec("some", 13, 1, block_hashes=hashes, remote_tokens=12))
        driver.run()
        driver.submit(spec("none", 13, 1, block_hashes=hashes, remote_tokens=12))
        driver.run()
        assert driver.pulls == [KvPull(request_id="some", num_tokens=4)]
        assert driver.unneeded_pulls == ["none"]
        assert driver.prefilled["none"].num_cached_tokens == 12

    def test_an_aborted_pull_holds_its_blocks_until_it_ends(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 12, 2, remote_tokens=12))
        assert driver.abort("a")
        assert driver.load().num_waiting == 0
        assert driver.load().kv_used_blocks == 3
        assert not driver.model.drained
        driver.run()
        assert driver.load().kv_used_blocks == 0
        assert driver.model.drained
        assert not driver.finished


class TestAbortAndFailure:
    @pytest.mark.parametrize("at_s", [0.0, 0.0005, 0.0015, 0.0035, 0.0105])
    def test_an_abort_frees_everything_at_once(self, at_s: float) -> None:
        driver = Driver()
        driver.submit(spec("a", 40, 20, keep_kv=True))
        driver.run(until_s=at_s)
        assert driver.abort("a")
        assert not driver.abort("a")
        assert driver.load().kv_used_blocks == 0
        driver.run()
        assert driver.model.drained
        assert not driver.finished

    def test_an_aborted_request_leaves_the_others_alone(self) -> None:
        driver = Driver(max_decode_steps=100)
        driver.submit(spec("a", 4, 20), spec("b", 4, 20), spec("c", 4, 20))
        driver.run(until_s=0.0055)
        driver.abort("b")
        driver.run()
        assert set(driver.finished) == {"a", "c"}

    def test_a_dead_worker_loses_all_it_has_and_takes_nothing(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 4, 20), spec("b", 4, 20, remote_tokens=4))
        driver.run(until_s=0.0035)
        assert set(driver.model.fail(0.0035)) == {"a", "b"}
        driver.run()
        assert driver.model.dead
        assert driver.load().kv_used_blocks == 0
        with pytest.raises(WorkerLost):
            driver.model.submit(0.02, spec("c", 4, 1))

    def test_a_stall_delays_the_step_in_flight(self) -> None:
        driver = Driver(max_decode_steps=100)
        driver.submit(spec("a", 4, 4))
        driver.run(until_s=0.0025)
        with driver.event() as model:
            model.stall(driver.now_s, 2.0)
        driver.run()
        assert driver.token_times_s["a"] == pytest.approx([0.001, 0.002, 2.003, 2.004])

    def test_a_stalled_idle_worker_starts_late(self) -> None:
        driver = Driver()
        driver.model.stall(0.0, 2.0)
        driver.submit(spec("a", 4, 1))
        driver.run()
        assert driver.token_times_s["a"] == pytest.approx([2.001])

    def test_a_draining_worker_finishes_what_it_has(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 4, 5, keep_kv=True))
        driver.model.set_draining(0.0, True)
        with pytest.raises(Draining):
            driver.submit(spec("b", 4, 5))
        driver.run(until_s=1.0)
        assert "a" in driver.finished
        assert not driver.model.drained
        driver.model.release(1.0, "a")
        assert driver.model.drained
        driver.model.set_draining(1.0, False)
        driver.submit(spec("b", 4, 5))

    def test_a_full_queue_refuses(self) -> None:
        driver = Driver(WorkerModelConfig(num_kv_blocks=16, max_num_seqs=1, max_num_waiting=1))
        driver.submit(spec("running", 4, 5))
        driver.submit(spec("waiting", 4, 5))
        with pytest.raises(Overloaded):
            driver.submit(spec("refused", 4, 5))

    def test_a_request_id_cannot_be_used_twice_at_a_time(self) -> None:
        driver = Driver()
        driver.submit(spec("a", 4, 1, keep_kv=True))
        with pytest.raises(ValueError, match="taken"):
            driver.submit(spec("a", 4, 1))
        driver.run(until_s=1.0)
        with pytest.raises(ValueError, match="taken"):
            driver.submit(spec("a", 4, 1))

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"max_num_batched_tokens": 8}, "max_num_batched_tokens"),
            ({"num_kv_blocks": 0}, "num_kv_blocks"),
            ({"hash_block_tokens": 24}, "hash_block_tokens"),
        ],
    )
    def test_impossible_limits_are_named(self, wrong: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            WorkerModelConfig(**{"num_kv_blocks": 16, "max_num_seqs": 9} | wrong)

    def test_time_cannot_go_back(self) -> None:
        driver = Driver()
        driver.model.submit(1.0, spec("a", 4, 1))
        with pytest.raises(AssertionError, match="time went back"):
            driver.model.plan_step(0.9)

    @pytest.mark.parametrize("wrong", [(0, 1, 0), (1, 0, 0), (4, 1, 5)])
    def test_impossible_sequences_are_refused(self, wrong: tuple[int, int, int]) -> None:
        with pytest.raises(ValueError, match="must"):
            spec("a", wrong[0], wrong[1], remote_tokens=wrong[2])


submits = st.fixed_dictionaries(
    {
        "num_prompt_tokens": st.integers(1, 40),
        "max_tokens": st.integers(1, 24),
        "priority": st.sampled_from([0, 0, 1]),
        "keep_kv": st.booleans(),
        "remote": st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        "family": st.sampled_from(["", "x", "y"]),
        "pull_ok": st.booleans(),
    }
)
events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), submits),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("release"), st.integers(0, 30)),
        st.tuples(st.just("renew"), st.integers(0, 30)),
        st.tuples(st.just("stall"), st.floats(0, 0.05)),
        st.tuples(st.just("wait"), st.floats(0, 0.03)),
    ),
    max_size=40,
)


def play(story: list[tuple[str, Any]], max_decode_steps: int) -> tuple[Driver, set[str], set[str]]:
    """Tells a story and runs what it began to its end."""
    driver, submitted, aborted = tell(story, max_decode_steps)
    driver.run()
    return driver, submitted, aborted


def tell(story: list[tuple[str, Any]], max_decode_steps: int) -> tuple[Driver, set[str], set[str]]:
    """Goes through a story; returns the driver, who was submitted and who was aborted."""
    driver = Driver(step_time=H200_LLAMA_8B_FP8, max_decode_steps=max_decode_steps)
    submitted: list[str] = []
    aborted = set()
    for event, value in story:
        if event == "submit":
            request_id, prompt = f"r{len(submitted)}", value["num_prompt_tokens"]
            submitted.append(request_id)
            driver.pulls_succeed = value["pull_ok"]
            driver.submit(
                spec(
                    request_id,
                    prompt,
                    value["max_tokens"],
                    priority=value["priority"],
                    keep_kv=value["keep_kv"],
                    remote_tokens=int(prompt * value["remote"]),
                    block_hashes=[(value["family"], i) for i in range(16)] if value["family"] else [],
                )
            )
        elif event == "wait":
            driver.run(until_s=driver.now_s + value)
        elif event == "stall":
            with driver.event() as model:
                model.stall(driver.now_s, value)
        elif submitted:
            request_id = submitted[value % len(submitted)]
            if event == "abort":
                if driver.abort(request_id):
                    aborted.add(request_id)
            elif event == "renew":
                driver.model.renew(driver.now_s, request_id, 9.0)
            else:
                with driver.event() as model:
                    model.release(driver.now_s, request_id)
    return driver, set(submitted), aborted


class TestLaws:
    @settings(max_examples=300, deadline=None)
    @given(events)
    def test_every_request_finishes_once_with_all_its_tokens_unless_it_was_aborted(
        self, story: list[tuple[str, Any]]
    ) -> None:
        driver, submitted, aborted = play(story, max_decode_steps=16)
        assert submitted == aborted | set(driver.finished)
        assert not aborted & set(driver.finished)
        max_tokens = [value["max_tokens"] for event, value in story if event == "submit"]
        for request_id in driver.finished:
            times_s = driver.token_times_s[request_id]
            assert len(times_s) == max_tokens[int(request_id[1:])]
            assert all(a < b for a, b in pairwise(times_s))

    @settings(max_examples=300, deadline=None)
    @given(events)
    def test_no_block_is_held_when_nothing_is_left(self, story: list[tuple[str, Any]]) -> None:
        driver, _, _ = play(story, max_decode_steps=16)
        load = driver.load()
        assert driver.model.drained
        assert (load.num_running, load.num_waiting, load.waiting_prefill_tokens) == (0, 0, 0)
        assert (load.kv_used_blocks, load.num_pinned) == (0, 0)

    @settings(max_examples=300, deadline=None)
    @given(events)
    def test_steps_planned_many_at_once_give_the_very_same_times(self, story: list[tuple[str, Any]]) -> None:
        one, _, _ = play(story, max_decode_steps=1)
        many, _, _ = play(story, max_decode_steps=50)
        assert one.token_times_s == many.token_times_s
        assert one.finished == many.finished
        assert one.preempted == many.preempted
        assert len(many.steps) <= len(one.steps)

    @settings(max_examples=50, deadline=None)
    @given(events)
    def test_a_copy_taken_in_mid_run_goes_on_by_itself_to_the_same_end(
        self, story: list[tuple[str, Any]]
    ) -> None:
        driver = tell(story, max_decode_steps=16)[0]
        copied = copy.deepcopy(driver)
        driver.run()
        copied.run()
        assert copied.token_times_s == driver.token_times_s
        assert copied.finished == driver.finished


class TestPerformanceModel:
    def test_chunks_of_a_prompt_add_up_to_the_whole(self) -> None:
        whole = PrefillChunk(context_tokens=0, num_tokens=5000, ends_prompt=True)
        parts = [
            PrefillChunk(context_tokens=0, num_tokens=2048, ends_prompt=False),
            PrefillChunk(context_tokens=2048, num_tokens=2048, ends_prompt=False),
            PrefillChunk(context_tokens=4096, num_tokens=904, ends_prompt=True),
        ]
        model = H200_LLAMA_8B_FP8
        extra_s = 2 * model.decode_base_ms / 1e3
        assert sum(model.step_s([part], 0, 0) for part in parts) == pytest.approx(
            model.step_s([whole], 0, 0) + extra_s
        )

    def test_the_named_profile_gives_its_published_fits(self) -> None:
        chunk = PrefillChunk(context_tokens=0, num_tokens=4000, ends_prompt=True)
        assert H200_LLAMA_8B_FP8.step_s([chunk], 0, 0) * 1e3 == pytest.approx(
            4.21e-7 * 4000**2 + 0.01518 * 4000 + 16.50
        )
        assert H200_LLAMA_8B_FP8.step_s([], 64, 100_000) * 1e3 == pytest.approx(
            4.677 + 0.03812 * 64 + 2.878e-5 * 100_000
        )

    def test_a_mixed_step_pays_one_constant(self) -> None:
        chunk = PrefillChunk(context_tokens=0, num_tokens=1000, ends_prompt=True)
        model = H200_LLAMA_8B_FP8
        apart_s = model.step_s([chunk], 0, 0) + model.step_s([], 8, 4000)
        assert model.step_s([chunk], 8, 4000) == pytest.approx(apart_s - model.decode_base_ms / 1e3)

    def test_decode_runs_end_when_the_same_steps_one_by_one_end(self) -> None:
        ends_s = H200_LLAMA_8B_FP8.decode_ends_s(1.0, 7, 1000, 50)
        assert ends_s == StepTime.decode_ends_s(H200_LLAMA_8B_FP8, 1.0, 7, 1000, 50)

    def test_a_transfer_takes_latency_and_bandwidth(self) -> None:
        assert KvLink(latency_s=0.001, bytes_per_s=1e9).transfer_s(500_000_000) == pytest.approx(0.501)
