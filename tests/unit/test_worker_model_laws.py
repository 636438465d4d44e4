"""What holds for the worker model whatever happens to it."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from core.performance_model import H200_LLAMA_8B_FP8
from tests.unit.worker_driver import Driver, spec

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
