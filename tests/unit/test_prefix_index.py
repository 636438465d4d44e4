from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.prompt_blocks import chain_states, root_state
from router.block_rows import States
from router.prefix_guess import GuessedPrefixes, PrefixKnowledge
from router.prefix_index import PrefixIndex


def names(values: Iterable[int]) -> States:
    return np.array(list(values), np.uint64)


def spread(values: Iterable[int]) -> States:
    """Names as chains make them, one for each small number."""
    roots = [root_state(model=str(value)) for value in values]
    return names(roots)


class NaiveIndex:
    """The same by sets."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}

    def apply(self, action: str, worker: str, blocks: list[int]) -> None:
        if action == "remove":
            self.held.pop(worker, None)
            return
        held = self.held.setdefault(worker, set())
        if action in ("clear", "replace"):
            held.clear()
        if action in ("store", "replace"):
            held.update(blocks)
        if action == "evict":
            held.difference_update(blocks)

    def match(self, prompt: list[int]) -> dict[str, int]:
        return {w: n for w, held in self.held.items() if (n := leading(prompt, held))}


def leading(prompt: list[int], held: set[int]) -> int:
    return next((n for n, block in enumerate(prompt) if block not in held), len(prompt))


def apply(index: PrefixIndex[str], action: str, worker: str, blocks: States) -> None:
    if action == "remove":
        index.remove_worker(worker)
        return
    index.set_worker(worker)
    if action == "clear":
        index.clear(worker)
    else:
        getattr(index, action)(worker, blocks)


workers = st.sampled_from(["a", "b", "c", "d", "e"])
actions = st.sampled_from(["store"] * 5 + ["evict"] * 3 + ["clear", "replace", "remove"])
ranges = st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(1, 3)).map(
    lambda r: list(range(r[0], r[0] + r[1], r[2]))
)
blocks = st.one_of(ranges, st.lists(st.integers(0, 12), max_size=30))
stories = st.lists(st.tuples(actions, workers, blocks), max_size=40)


@settings(max_examples=150, deadline=None)
@given(stories, st.lists(blocks, min_size=1, max_size=5), st.booleans())
def test_the_index_says_what_sets_of_blocks_say(
    story: list[tuple[str, str, list[int]]], prompts: list[list[int]], are_spread: bool
) -> None:
    made = spread if are_spread else lambda values: names(value + 1 for value in values)
    naive, index = NaiveIndex(), PrefixIndex[str](max_blocks=4096)
    for action, worker, changed in story:
        naive.apply(action, worker, changed)
        apply(index, action, worker, made(changed))
    for prompt in [*prompts, list(range(600))]:
        assert index.match(made(prompt)) == naive.match(prompt)
    for worker in "abcde":
        held = naive.held.get(worker, set())
        assert index.num_blocks(worker) == len(held)
        assert (worker in index) == (worker in naive.held)
        assert index.is_complete(worker)
    assert len(index) == len(set().union(*naive.held.values()))


@settings(max_examples=100, deadline=None)
@given(stories, blocks)
def test_an_index_that_is_full_leaves_out_but_makes_nothing_up(
    story: list[tuple[str, str, list[int]]], prompt: list[int]
) -> None:
    naive, index = NaiveIndex(), PrefixIndex[str](max_blocks=100)
    for action, worker, changed in story:
        naive.apply(action, worker, changed)
        apply(index, action, worker, spread(changed))
        assert len(index) <= 100
    truth = naive.match(prompt)
    for worker, num_blocks in index.match(spread(prompt)).items():
        assert num_blocks <= truth[worker]
    for worker, held in naive.held.items():
        if index.is_complete(worker):
            assert index.num_blocks(worker) == len(held)
            assert index.match(spread(prompt)).get(worker, 0) == truth.get(worker, 0)


def test_a_full_index_keeps_a_batch_s_first_blocks_and_takes_more_when_others_go() -> None:
    index = PrefixIndex[str](max_blocks=10)
    for worker in "ab":
        index.set_worker(worker)
    index.store("a", spread(range(6)))
    index.store("b", spread(range(100, 106)))
    assert index.match(spread(range(100, 106))) == {"b": 4}
    assert (index.is_complete("a"), index.is_complete("b")) == (True, False)
    index.store("b", spread(range(6)))
    assert index.match(spread(range(6))) == {"a": 6, "b": 6}
    index.evict("a", spread(range(6)))
    index.remove_worker("a")
    index.replace("b", spread(range(100, 106)))
    assert index.is_complete("b")
    assert index.match(spread(range(100, 106))) == {"b": 6}


def test_sets_of_workers_are_bounded_too() -> None:
    index = PrefixIndex[int](max_blocks=4000)
    rng = np.random.default_rng(5)
    everything = spread(range(3000))
    for worker in range(20):
        index.set_worker(worker)
        index.store(worker, everything[:1] if worker else everything)
        index.store(worker, everything[rng.random(3000) < 0.5])
    assert len(index._sets) <= 1024
    assert index.num_blocks(0) == 3000
    assert index.is_complete(0)
    assert not index.is_complete(19)
    assert index.match(everything)[0] == 3000


def test_a_table_that_grows_while_workers_come_and_go_loses_nothing() -> None:
    index = PrefixIndex[str](max_blocks=200_000)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, 2**63, 997, dtype=np.uint64) for _ in range(150)]
    for number, prompt in enumerate(prompts):
        index.set_worker(f"w{number}")
        index.store(f"w{number}", prompt)
        if number % 5 == 4:
            index.remove_worker(f"w{number - 2}")
    for number, prompt in enumerate(prompts):
        expected = {} if number % 5 == 2 else {f"w{number}": 997}
        assert index.match(prompt) == expected
    assert len(index) == 120 * 997


def test_many_times_its_size_passes_through_an_index_with_nothing_left_out() -> None:
    index = PrefixIndex[str](max_blocks=10_000)
    index.set_worker("a")
    rng = np.random.default_rng(4)
    batches = [rng.integers(1, 2**63, 500, dtype=np.uint64) for _ in range(300)]
    for number, batch in enumerate(batches):
        index.store("a", batch)
        if number >= 19:
            index.evict("a", batches[number - 19])
    assert index.is_complete("a")
    assert index.num_blocks("a") == len(index) == 19 * 500
    assert all(index.match(batch) == {"a": 500} for batch in batches[-19:])


def test_events_of_a_worker_that_is_not_known_are_refused() -> None:
    index = PrefixIndex[str]()
    for act in (index.store, index.evict, index.replace):
        with pytest.raises(ValueError, match="worker 'x' is not known: call set_worker first"):
            act("x", spread(range(3)))
    index.remove_worker("x")
    with pytest.raises(ValueError, match="max_blocks must be at least 1, not 0"):
        PrefixIndex[str](0)


def test_an_empty_prompt_matches_nothing() -> None:
    index = PrefixIndex[str]()
    index.set_worker("a")
    assert index.match(names([])) == {}
    index.store("a", names([0]))
    assert index.match(names([])) == {}
    assert index.match(names([0])) == {"a": 1}


sends = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(1, 30), st.floats(0, 20)), max_size=40
)


@settings(deadline=None)
@given(sends, st.integers(0, 5), st.floats(0, 60))
def test_guesses_count_for_three_quarters_of_their_time_and_never_beyond_it(
    story: list[tuple[str, int, int, float]], family: int, wait_s: float
) -> None:
    guesses = GuessedPrefixes(ttl_s=40.0)
    for worker in "abc":
        guesses.set_worker(worker, 10_000)
    now_s, last_sent_s = 0.0, dict[tuple[str, int], float]()
    for worker, sent_family, length, gap_s in story:
        now_s += gap_s
        ids = range(100 * sent_family, 100 * sent_family + length)
        guesses.sent(worker, spread(ids), now_s)
        last_sent_s |= {(worker, block): now_s for block in ids}
    now_s += wait_s
    prompt = list(range(100 * family, 100 * family + 30))

    def truth(ttl_s: float) -> Counter[str]:
        fresh = {key for key, sent_s in last_sent_s.items() if now_s - sent_s <= ttl_s}
        return Counter({w: leading(prompt, {b for v, b in fresh if v == w}) for w in "abc"})

    matched = Counter(guesses.match(spread(prompt), now_s))
    assert truth(29.9) <= matched <= truth(40.0)


@settings(deadline=None)
@given(sends, st.integers(1, 60))
def test_guesses_fit_the_worker_and_always_hold_what_was_sent_last(
    story: list[tuple[str, int, int, float]], capacity: int
) -> None:
    guesses = GuessedPrefixes(ttl_s=1e9)
    for worker in "abc":
        guesses.set_worker(worker, capacity)
    for worker, family, length, _ in story:
        prompt = spread(range(100 * family, 100 * family + length))
        guesses.sent(worker, prompt, 0.0)
        assert guesses.match(prompt, 0.0)[worker] >= min(length, capacity)
        assert guesses.num_blocks(worker) <= capacity
    for worker in "abc":
        guesses.set_worker(worker, 1)
        assert guesses.num_blocks(worker) <= 1
        guesses.remove_worker(worker)
    assert guesses.match(spread(range(30)), 0.0) == {}


def test_of_guesses_the_ones_used_longest_ago_go_first() -> None:
    guesses = GuessedPrefixes(ttl_s=1e9)
    guesses.set_worker("a", 100)
    prompts = [spread(range(1000 * n, 1000 * n + 20)) for n in range(8)]
    for prompt in (*prompts[:4], prompts[0], prompts[4], prompts[5]):
        guesses.sent("a", prompt, 0.0)
    known = [guesses.match(prompt, 0.0).get("a", 0) for prompt in prompts]
    assert known[0] == known[4] == known[5] == 20
    assert known[1] == 0


def knowledge(**settings: Any) -> PrefixKnowledge:
    made = PrefixKnowledge(ttl_s=100.0, in_flight_s=5.0, **settings)
    for worker in ("events", "silent"):
        made.set_worker(worker, 1000)
    made.replace("events", names([]))
    return made


def test_a_burst_of_equal_prompts_sees_itself_until_events_tell_better() -> None:
    known, prompt = knowledge(), spread(range(10))
    known.sent("events", prompt, 0.0)
    assert known.match(prompt, 1.0) == {"events": 10}
    known.store("events", prompt[:6])
    assert known.match(prompt, 2.0) == {"events": 10}
    assert known.match(prompt, 6.0) == {"events": 6}
    known.evict("events", prompt)
    assert known.match(prompt, 7.0) == {}


def test_a_worker_without_events_is_guessed_at_for_long() -> None:
    known, prompt = knowledge(), spread(range(10))
    known.sent("silent", prompt, 0.0)
    known.store("silent", spread(range(20)))
    assert known.match(spread(range(20)), 70.0) == {"silent": 10}
    assert known.match(prompt, 101.0) == {}


def test_a_removed_worker_is_forgotten() -> None:
    known, prompt = knowledge(), spread(range(10))
    known.sent("silent", prompt, 0.0)
    known.remove_worker("silent")
    assert known.match(prompt, 0.0) == {}


def test_blocks_left_out_of_a_full_index_are_guessed_at() -> None:
    known, prompt = knowledge(max_blocks=20), spread(range(100, 110))
    known.store("events", spread(range(25)))
    known.sent("events", prompt, 0.0)
    known.store("events", prompt)
    assert known.match(prompt, 60.0) == {"events": 10}


def test_a_prompt_in_blocks_is_found_again_by_its_beginning() -> None:
    root = root_state(model="m")
    known = knowledge()
    known.store("events", chain_states(root, range(100), 16))
    longer = chain_states(root, [*range(90), *range(500, 600)], 16)
    assert known.match(longer, 0.0) == {"events": 5}
    assert known.match(chain_states(root_state(model="m", salt="s"), range(100), 16), 0.0) == {}
