"""What vLLM says of a step becomes a delta without loss, also when it has merged two steps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytestmark = pytest.mark.engine


def flat(*rows: tuple[list[int], list[float], int]):
    """Logprobs of each row as the engine makes them: tokens, logprobs, rank of the first."""
    from vllm.logprobs import FlatLogprobs

    logprobs = FlatLogprobs()
    for token_ids, values, rank in rows:
        ranks = itertools.chain((rank,), range(1, len(token_ids)))
        logprobs.append_fast(token_ids, values, ranks, [None] * len(token_ids))
    return logprobs


def output(token_ids: list[int], logprobs):
    from vllm.outputs import CompletionOutput, RequestOutput

    completion = CompletionOutput(0, "", token_ids, None, logprobs)
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=None,
        prompt_logprobs=None,
        outputs=[completion],
        finished=False,
    )


ROWS = [
    ([5, 5, 6], [-1.0, -1.0, -2.0], 1),
    ([7, 8, 7], [-3.0, -1.0, -3.0], 2),
    ([9, 8, 7], [-4.0, -1.0, -3.0], 3),
    ([8, 8, 9], [-0.5, -0.5, -4.0], 1),
]


@pytest.mark.parametrize("num_merged", [1, 2, 3, 4])
def test_merged_steps_keep_every_row_of_logprobs(num_merged: int) -> None:
    from engine.vllm_codec import delta_from_output

    merged = output([ROWS[0][0][0]], flat(ROWS[0]))
    for row in ROWS[1:num_merged]:
        merged.add(output([row[0][0]], flat(row)), aggregate=True)

    rows = delta_from_output(merged, first=False).logprobs

    assert rows is not None
    assert rows.token_ids.tolist() == [token_ids for token_ids, _, _ in ROWS[:num_merged]]
    assert np.allclose(rows.logprobs, [values for _, values, _ in ROWS[:num_merged]])
    assert rows.ranks.tolist() == [rank for _, _, rank in ROWS[:num_merged]]


def test_merged_steps_without_candidates_keep_the_sampled_token() -> None:
    from engine.vllm_codec import delta_from_output

    merged = output([5], flat(([5], [-1.0], 1)))
    merged.add(output([6], flat(([6], [-2.0], 7))), aggregate=True)

    rows = delta_from_output(merged, first=False).logprobs

    assert rows is not None
    assert rows.token_ids.tolist() == [[5], [6]]
    assert rows.ranks.tolist() == [1, 7]
