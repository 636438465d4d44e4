"""Which path a request may take, from what it asks of sampling.

Four paths, from most to least freedom:

* ``remote_early``: prefill worker, its first token is sent at once, decode worker goes on after it.
* ``remote``: prefill worker for the KV only; the decode worker samples the first token itself,
  because the first token's place in the *output* matters to what follows (penalties, grammars,
  seeded sampling).
* ``local``: one decode worker does everything, because the answer needs more than a handoff carries.
* ``prefill_only``: nothing is left to decode after the first token.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.request import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFacts:
    """What the choice of a path needs to know of a request's sampling parameters."""

    max_tokens: int
    num_siblings: int = 1
    """n: sequences sampled from this prompt."""
    needs_whole_prompt: bool = False
    """Something is computed for every prompt token (prompt logprobs)."""
    depends_on_output_history: bool = False
    """The next token depends on which tokens were generated, beyond their being in the context."""


def choose_path(facts: SamplingFacts) -> Path:
    """The path with the earliest first token that cannot change the answer."""
    if facts.num_siblings > 1 or facts.needs_whole_prompt:
        return Path.LOCAL
    if facts.max_tokens == 1:
        return Path.PREFILL_ONLY
    if facts.depends_on_output_history:
        return Path.REMOTE
    return Path.REMOTE_EARLY
