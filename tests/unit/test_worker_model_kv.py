"""The worker model: KV memory, prefix cache and handoff."""

from __future__ import annotations

import pytest

from core.worker_events import (
    KvPull,
    WorkerModelConfig,
)
from tests.unit.worker_driver import Driver, chunk_sizes, spec


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
