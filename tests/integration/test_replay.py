"""The logits processors that make an engine begin an answer with given tokens, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from engine.base import EngineRequest
from engine.replay import REPLAY_ARG, ReplayInRows, ReplayInSlots, replay_processor
from engine.vllm_codec import RequestDecoder, encode_sampling_params

VOCABULARY = 50


def replaying(*token_ids: int) -> SamplingParams:
    return SamplingParams(extra_args={REPLAY_ARG: list(token_ids)})


def chosen(logits: torch.Tensor) -> list[int | None]:
    """By row, the only token that may be chosen; None where all may."""
    allowed = [torch.isfinite(row).nonzero().flatten().tolist() for row in logits]
    return [tokens[0] if len(tokens) == 1 else None for tokens in allowed]


def logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCABULARY)


def update(num_rows: int, *, added=(), removed=(), moved=()) -> BatchUpdate:
    return BatchUpdate(batch_size=num_rows, removed=removed, added=added, moved=moved)


def in_rows() -> ReplayInRows:
    return ReplayInRows(None, torch.device("cpu"), False)


def test_a_row_is_given_one_token_after_another_and_then_left_alone() -> None:
    processor, output = in_rows(), []
    processor.update_state(update(1, added=[(0, replaying(7, 8, 9), [1, 2], output)]))
    seen = []
    for _ in range(5):
        processor.update_state(None)
        (token,) = chosen(processor.apply(logits(1)))
        seen.append(token)
        output.append(-1)  # a runner that schedules ahead does not know the token yet
    assert seen == [7, 8, 9, None, None]


def test_other_rows_are_not_touched() -> None:
    processor, before = in_rows(), logits(3)
    added = [(0, SamplingParams(), [1], []), (1, replaying(7), [1], []), (2, SamplingParams(), [1], [])]
    processor.update_state(update(3, added=added))
    after = processor.apply(before.clone())
    assert chosen(after) == [None, 7, None]
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_rows_that_move_take_their_tokens_along() -> None:
    processor = in_rows()
    processor.update_state(
        update(3, added=[(0, replaying(4), [1], []), (1, replaying(5), [1], []), (2, replaying(6), [1], [])])
    )
    processor.update_state(update(3, moved=[(0, 2, MoveDirectionality.SWAP)]))
    assert chosen(processor.apply(logits(3))) == [6, 5, 4]
    processor.update_state(update(2, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert chosen(processor.apply(logits(2))) == [4, 5]


def test_a_request_that_comes_back_from_preemption_goes_on_at_its_place() -> None:
    processor = in_rows()
    processor.update_state(update(1, added=[(0, replaying(7, 8, 9), [1], [7, 8])]))
    assert chosen(processor.apply(logits(1))) == [9]


def in_slots(prompt_lens: list[int]) -> ReplayInSlots:
    return ReplayInSlots(None, SimpleNamespace(prompt_len=SimpleNamespace(np=np.array(prompt_lens))))


def batch(slots: list[int], seq_lens: list[int]) -> SimpleNamespace:
    return SimpleNamespace(idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=np.array(seq_lens))


def test_a_slot_is_given_one_token_after_another_wherever_it_stands_in_the_batch() -> None:
    processor = in_slots([10, 20, 30])
    assert not processor.add_request(0, SamplingParams())
    assert processor.add_request(2, replaying(7, 8))
    assert chosen(processor.apply(logits(2), batch([2, 0], [30, 12]))) == [7, None]
    assert chosen(processor.apply(logits(2), batch([0, 2], [13, 31]))) == [None, 8]
    assert chosen(processor.apply(logits(2), batch([0, 2], [14, 32]))) == [None, None]


def test_a_part_of_a_prompt_has_no_token_to_choose() -> None:
    processor = in_slots([100])
    processor.add_request(0, replaying(7))
    assert chosen(processor.apply(logits(1), batch([0], [64]))) == [None]


def test_a_slot_that_is_used_again_forgets_what_it_was_to_say() -> None:
    processor = in_slots([10])
    processor.add_request(0, replaying(7))
    assert not processor.add_request(0, SamplingParams())
    assert chosen(processor.apply(logits(1), batch([0], [10]))) == [None]


@pytest.mark.parametrize(
    ("speculative", "second_runner", "expected"),
    [(None, False, "ReplayInRows"), (None, True, "ReplayInSlots"), (object(), False, None)],
)
def test_each_model_runner_has_its_processor(
    speculative: object, second_runner: bool, expected: str | None
) -> None:
    config = SimpleNamespace(speculative_config=speculative, use_v2_model_runner=second_runner)
    assert replay_processor(config) == (f"engine.replay:{expected}" if expected else None)


def test_only_a_router_says_what_is_replayed() -> None:
    params = SamplingParams(max_tokens=9, extra_args={REPLAY_ARG: [1, 2], "mine": 3})
    request = EngineRequest(
        request_id="r", prompt_token_ids=[1], max_tokens=4, sampling_params=encode_sampling_params(params)
    )
    got, _ = RequestDecoder().decode(request)
    assert got.extra_args == {"mine": 3}
