"""Prompts that no cache knows: each seed gives another one, the same on every machine."""

from __future__ import annotations

import random

FIRST_TOKEN_ID, LAST_TOKEN_ID = 300, 2000
"""Ordinary tokens of the tiny model: neither special nor single bytes."""
_SENTENCES = (
    "return the value of a path when file name and mode are given or raise an error if none can be read "
    "class object method test string list code line module source function frame type import default"
)
_WORDS = _SENTENCES.split()


def tokens(num_tokens: int, seed: int | str) -> list[int]:
    """Random token ids."""
    source = random.Random(f"tokens {seed}")
    return [source.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(num_tokens)]


def text(seed: int | str, num_words: int = 150) -> str:
    """Random words, a little more than one token each."""
    source = random.Random(f"text {seed}")
    return " ".join(source.choice(_WORDS) for _ in range(num_words))


def chat(seed: int | str, num_words: int = 150) -> list[dict[str, str]]:
    """A conversation of three messages."""
    return [
        {"role": "system", "content": "You answer."},
        {"role": "user", "content": text(seed, num_words)},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Go on."},
    ]
