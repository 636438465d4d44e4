"""Token ids without a model: each one a hash of all tokens in front of it.

So a sequence continued elsewhere, as a prompt that ends with the tokens emitted so far, goes on exactly
as it would have, and any token lost, repeated or swapped on the way changes all that follow.

Tokens t_0 .. t_{n-1} have the state sum (t_i + 1) * A^(n-1-i) modulo 2^64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_A = 6364136223846793005
_MIX = 0xFF51AFD7ED558CCD
_FOLD = 256


def block_states(token_ids: Sequence[int], block_size_tokens: int) -> list[int]:
    """The state at the end of each full block: a hash of everything up to there."""
    num_blocks = len(token_ids) // block_size_tokens
    tokens = np.array(token_ids[: num_blocks * block_size_tokens], dtype=np.uint64) + np.uint64(1)
    powers = np.full(block_size_tokens, _A, dtype=np.uint64)
    powers[0] = 1
    powers = np.cumprod(powers, dtype=np.uint64)
    sums = (tokens.reshape(num_blocks, block_size_tokens) * powers[::-1]).sum(axis=1, dtype=np.uint64)
    shift = pow(_A, block_size_tokens, 1 << 64)
    states, state = [], 0
    for block_sum in sums.tolist():
        state = (state * shift + block_sum) & _MASK
        states.append(state)
    return states


class TokenSource:
    """Emits the tokens that follow a prompt.

    Args:
        prompt_token_ids: what stands in front.
        low: least token id emitted.
        high: one above the greatest.
    """

    __slots__ = ("_low", "_span", "_state")

    def __init__(self, prompt_token_ids: Sequence[int], low: int, high: int) -> None:
        states = block_states(prompt_token_ids, _FOLD)
        state = states[-1] if states else 0
        for token in prompt_token_ids[len(states) * _FOLD :]:
            state = (state * _A + token + 1) & _MASK
        self._state = state
        self._low = low
        self._span = high - low

    def take(self, num_tokens: int) -> list[int]:
        """The next tokens."""
        state, low, span = self._state, self._low, self._span
        tokens = []
        for _ in range(num_tokens):
            mixed = ((state ^ (state >> 33)) * _MIX) & _MASK
            token = low + (mixed >> 32) % span
            state = (state * _A + token + 1) & _MASK
            tokens.append(token)
        self._state = state
        return tokens
