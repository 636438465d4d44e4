from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.prompt_blocks import chain_states, root_state

ROOT = root_state(model="llama")
tokens = st.lists(st.integers(0, 200_000), max_size=40)


@given(tokens, st.integers(1, 9))
def test_there_is_one_state_a_full_block_whatever_holds_the_tokens(ids: list[int], size: int) -> None:
    states = chain_states(ROOT, ids, size)
    assert states.dtype == np.uint64
    assert states.shape == (len(ids) // size,)
    others: list[Sequence[int] | np.ndarray[Any, Any]] = [
        tuple(ids),
        array("i", ids),
        np.array(ids, np.int64),
    ]
    others += [np.array(ids, np.uint32), np.array(ids, np.int32)]
    for other in others:
        assert np.array_equal(chain_states(ROOT, other, size), states)


@given(tokens, st.integers(1, 9), st.integers(0, 9))
def test_a_chain_goes_on_from_any_state_of_it(ids: list[int], size: int, num_before: int) -> None:
    states = chain_states(ROOT, ids, size)
    num_before = min(num_before, len(states))
    parent = int(states[num_before - 1]) if num_before else ROOT
    assert np.array_equal(chain_states(parent, ids[num_before * size :], size), states[num_before:])


@given(tokens, st.integers(1, 9), st.integers(0, 39), st.integers(1, 1000))
def test_another_token_changes_the_states_from_its_block_on(
    ids: list[int], size: int, where: int, by: int
) -> None:
    before = chain_states(ROOT, ids, size)
    if where < len(ids):
        ids[where] += by
    after = chain_states(ROOT, ids, size)
    same = min(where // size, len(before))
    assert np.array_equal(before[:same], after[:same])
    assert not np.any(before[same:] == after[same:])


def test_the_chain_is_the_recurrence_it_says() -> None:
    states = [int(s) for s in chain_states(ROOT, range(100), 10)]
    value = [int(chain_states(0, range(i, i + 10), 10)[0]) for i in range(0, 100, 10)]
    factor = 0xD1342543DE82EF9B
    # From root 0 the first state is the block's own value.
    expected = ROOT
    for state, own in zip(states, value, strict=True):
        expected = (expected * factor + own) % 2**64
        assert state == expected


def test_model_adapter_and_salt_each_change_the_root() -> None:
    names = ("", "a", "ab", "b")
    roots = {root_state(model=m, adapter=a, salt=s) for m, a, s in product(names, repeat=3)}
    assert len(roots) == len(names) ** 3
    assert all(0 <= root < 2**64 for root in roots)


def test_names_are_the_same_in_another_process() -> None:
    code = (
        "from core.prompt_blocks import *;"
        "print(*chain_states(root_state(model='m', adapter='a', salt='s'), list(range(64)), 16))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    here = chain_states(root_state(model="m", adapter="a", salt="s"), range(64), 16)
    assert output.split() == [str(state) for state in here]


def test_a_million_blocks_that_are_hard_to_tell_apart_have_a_million_names() -> None:
    rng = np.random.default_rng(1)
    few_tokens = rng.integers(0, 2, (100_000, 3, 4))
    one_token = np.zeros(400_000, np.int64)
    counting = np.arange(400_000 * 4)
    blocks = rng.integers(0, 1000, (50, 4))
    shuffled = [blocks[rng.permutation(50)].reshape(-1) for _ in range(4000)]
    names = [chain_states(ROOT, one_token, 1), chain_states(ROOT, counting, 4)]
    names += [chain_states(ROOT + i, few_tokens[i].reshape(-1), 4) for i in range(0, 100_000, 100)]
    names += [chain_states(ROOT, prompt, 4) for prompt in shuffled]
    everything = np.concatenate(names)
    assert len(everything) > 1_000_000
    # Shuffled prompts that begin with the same block share its name, and the second one's now and then.
    prompts = np.array(shuffled).reshape(4000, 50, 4)
    num_different = len({prompt[:n].tobytes() for prompt in prompts for n in range(1, 51)})
    assert len(np.unique(everything)) == len(everything) - 4000 * 50 + num_different


def test_every_bit_of_a_name_is_as_often_0_as_1() -> None:
    states = chain_states(ROOT, np.arange(64_000), 1)
    ones = [int(((states >> np.uint64(bit)) & np.uint64(1)).sum()) / len(states) for bit in range(64)]
    assert all(0.48 < share < 0.52 for share in ones)


@pytest.mark.parametrize("bad", [[1.5, 2.0], ["a"], np.zeros((2, 2), np.int64), np.zeros(3), [2**70]])
def test_tokens_that_are_no_row_of_integers_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="token_ids must be"):
        chain_states(ROOT, bad, 1)


def test_a_block_has_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="block_size_tokens must be at least 1, not 0"):
        chain_states(ROOT, [1], 0)
