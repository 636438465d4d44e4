"""Names for the blocks of a prompt, so that equal beginnings have equal names on every machine.

Theory of operation: a full block of tokens gets a 64-bit value ``b``, and the name of a block is the state
of a chain that ran over all blocks up to it, ``s[i] = s[i-1] * P + b[i]`` modulo 2^64, from a root that
stands for model, adapter and salt. ``P`` is odd, so it has an inverse, and all states come at once from one
running sum: ``s[i] = P^i * (root + sum of b[j] * P^-j)``.

Chance of two unlike prefixes with one name. A block's value sums one mixed number per token and position
(the finalizer of SplitMix64, Steele et al. 2014, a bijection in which every input bit reaches every output
bit) and mixes the sum again, so values of unlike blocks are as good as independent and uniform. Then two
chains with unlike blocks meet with a chance of 2^-64. The chain itself is linear, so it is weaker where the
same blocks come in another order or number: two blocks swapped at a distance of ``d`` cancel where
``(b - b') * (P^d - 1)`` is 0. With P = 3 modulo 8 that takes 1 bit for odd d and 2 + (times 2 divides d)
for even d: 2^-50 at worst within 4096 blocks. Among ten million names some collision has a chance of 3e-6.

None of this withstands an attacker. It need not: a false match costs a worse choice of worker and never a
wrong answer, because engines go by their own caches.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_WORD = 1 << 64
_P = 0xD1342543DE82EF9B
"""Odd, and 3 modulo 8."""
_P_INVERSE = pow(_P, -1, _WORD)
_GOLDEN = 0x9E3779B97F4A7C15


def root_state(*, model: str, adapter: str = "", salt: str = "") -> int:
    """Where the chain of a prompt starts: what else, besides the tokens, makes KV blocks differ.

    Returns:
        64 bits; the same in every process.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (model, adapter, salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little")


def chain_states(
    root: int, token_ids: Sequence[int] | npt.NDArray[Any], block_size_tokens: int
) -> npt.NDArray[np.uint64]:
    """Names the full blocks of a prompt; each name stands for everything up to its block's end.

    Args:
        root: of ``root_state``, or the name of the block in front of these tokens.
        token_ids: any integers; tokens after the last full block do not count.
        block_size_tokens: tokens a block.

    Returns:
        One state a full block, shape (len(token_ids) // block_size_tokens,).

    Raises:
        ValueError: the block size is below 1, or ``token_ids`` is not a flat row of integers.
    """
    if block_size_tokens < 1:
        raise ValueError(f"block_size_tokens must be at least 1, not {block_size_tokens}")
    tokens = _as_words(token_ids)
    num_blocks = len(tokens) // block_size_tokens
    if not num_blocks:
        return np.empty(0, np.uint64)
    positions = np.arange(1, block_size_tokens + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    mixed = tokens[: num_blocks * block_size_tokens].reshape(num_blocks, block_size_tokens) + positions
    _mix(mixed)
    values = mixed.sum(axis=1, dtype=np.uint64)
    _mix(values)
    states: npt.NDArray[np.uint64] = np.multiply(values, _powers(_P_INVERSE, num_blocks), out=values)
    np.cumsum(states, out=states)
    states += np.uint64(int(root) % _WORD)
    states *= _powers(_P, num_blocks)
    return states


class PromptBlocks:
    """One prompt's block names, made once for every block size that is asked for.

    Args:
        root: of ``root_state``.
        token_ids: the prompt.
    """

    __slots__ = ("_by_size", "_root", "_token_ids")

    def __init__(self, root: int, token_ids: Sequence[int]) -> None:
        self._root = root
        self._token_ids = token_ids
        self._by_size: dict[int, npt.NDArray[np.uint64]] = {}

    def states(self, block_size_tokens: int) -> npt.NDArray[np.uint64]:
        """Of the full blocks; not to be written to."""
        states = self._by_size.get(block_size_tokens)
        if states is None:
            states = chain_states(self._root, self._token_ids, block_size_tokens)
            self._by_size[block_size_tokens] = states
        return states

    def most_cached_tokens(self, block_size_tokens: int) -> int:
        """What an engine takes from its cache at most: it computes the last token, and whole blocks only."""
        return (len(self._token_ids) - 1) // block_size_tokens * block_size_tokens


def _as_words(token_ids: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    # An array("q") reads a list several times faster than numpy does.
    try:
        tokens = np.asarray(array("q", token_ids) if isinstance(token_ids, list | tuple) else token_ids)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"token_ids must be integers of at most 64 bits: {error}") from error
    if tokens.size and (tokens.ndim != 1 or tokens.dtype.kind not in "iu"):
        raise ValueError(
            f"token_ids must be a flat row of integers, not shape {tokens.shape} of {tokens.dtype}"
        )
    return tokens.reshape(-1).astype(np.uint64)


def _powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    """``base`` to the power of 1, 2, ... ``count``, modulo 2^64."""
    return np.full(count, base, np.uint64).cumprod()


def _mix(words: npt.NDArray[np.uint64]) -> None:
    """SplitMix64's finalizer, in place."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
