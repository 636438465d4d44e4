"""The worker model: batching, many steps at once, aborts and failures."""

from __future__ import annotations

from itertools import pairwise

import pytest

from core.errors import Draining, Overloaded, WorkerLost
from core.performance_model import H200_LLAMA_8B_FP8
from core.worker_events import (
    WorkerModelConfig,
)
from tests.unit.worker_driver import Driver, chunk_sizes, spec


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
