"""Chats of several turns: each prompt is all that was said before, plus the user's new words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from core.errors import ConfigError
from simulator.traces.draws import Lengths, Poisson, check, checked_num
from simulator.traces.trace import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Sessions begin as a Poisson process and share one system prompt.

    The load starts with no session under way, so that it grows over about the length of a session.
    """

    rate_rps: float
    """New sessions a second."""
    duration_s: float
    """No turn comes later."""
    turns: float
    """Mean number of turns; geometric, so at least 1."""
    think_s: float
    """Mean time between an answer's end and the next turn; exponential."""
    user: Lengths
    """Tokens the user adds in a turn."""
    output: Lengths
    system_tokens: int = 0
    """Tokens of the system prompt, the same in all sessions."""
    assumed_tpot_s: float = 0.02
    """Time an answer is taken to last, per token: a trace cannot wait for the real one."""
    max_context_tokens: int = 131_072
    """A session ends before a turn whose prompt and output are longer together."""
    hash_block_tokens: int = 64
    """Tokens under one block hash."""

    def __post_init__(self) -> None:
        Poisson(rate_rps=self.rate_rps)
        check(0 < self.duration_s < math.inf, "duration", self.duration_s, "above 0 s")
        check(1 <= self.turns < math.inf, "turns", self.turns, "at least 1")
        check(0 <= self.think_s < math.inf, "think", self.think_s, "at least 0 s")
        check(0 <= self.assumed_tpot_s < math.inf, "tpot", self.assumed_tpot_s, "at least 0 s")
        check(self.system_tokens >= 0, "system", self.system_tokens, "at least 0 tokens")
        check(self.hash_block_tokens >= 1, "block", self.hash_block_tokens, "at least 1 token")
        if self.max_context_tokens < self.system_tokens + 2:
            raise ConfigError(
                f"context ({self.max_context_tokens}) must have room for the system prompt "
                f"({self.system_tokens} tokens), a word of the user and one of the answer"
            )

    def draw(self, rng: np.random.Generator) -> list[TraceRequest]:
        """The requests, sorted by arrival. A later turn's hashes begin with the earlier turn's."""
        checked_num(self.rate_rps * self.duration_s * self.turns)
        starts_s = Poisson(rate_rps=self.rate_rps).draw(rng, self.duration_s)
        num_turns = rng.geometric(1 / self.turns, size=len(starts_s))
        num_shared = self.system_tokens // self.hash_block_tokens
        next_hash = num_shared
        requests: list[TraceRequest] = []
        for start_s, num in zip(starts_s.tolist(), num_turns.tolist(), strict=True):
            session = list(self._session(rng, start_s, num))
            if not session:
                continue
            num_own = session[-1][1] // self.hash_block_tokens - num_shared
            pieces = (*range(num_shared), *range(next_hash, next_hash + num_own))
            next_hash += num_own
            requests.extend(
                TraceRequest(
                    arrival_s=arrival_s,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    block_hashes=pieces[: prompt // self.hash_block_tokens],
                )
                for arrival_s, prompt, output in session
            )
        requests.sort(key=lambda request: request.arrival_s)
        return requests

    def _session(
        self, rng: np.random.Generator, start_s: float, num_turns: int
    ) -> Iterator[tuple[float, int, int]]:
        """Arrival, prompt tokens and output tokens of each turn that fits."""
        users = self.user.draw(rng, num_turns).tolist()
        outputs = self.output.draw(rng, num_turns).tolist()
        thinks_s = rng.exponential(self.think_s, size=num_turns).tolist()
        arrival_s, context = start_s, self.system_tokens
        for user, output, think_s in zip(users, outputs, thinks_s, strict=True):
            prompt = context + user
            if prompt + output > self.max_context_tokens or arrival_s >= self.duration_s:
                return
            yield arrival_s, prompt, output
            context = prompt + output
            arrival_s += output * self.assumed_tpot_s + think_s
