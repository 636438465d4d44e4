"""Counts a router's traffic for the planner."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from core.traffic import (
    NUM_ANSWER_CLASSES,
    NUM_PROMPT_CLASSES,
    TrafficSummary,
    answer_class,
    prompt_class,
)


class TrafficCounter:
    """One a router; its methods cost a few additions each.

    Every request: :meth:`arrived`, :meth:`placed` when it is first sent to a worker, :meth:`tokens` for what
    its client gets, and exactly one end: finished, refused or failed, or none if its client went away.
    """

    def __init__(self, router_id: str) -> None:
        self._router_id = router_id
        self._num_arrived = [0] * NUM_PROMPT_CLASSES
        self._prompt_tokens = [0] * NUM_PROMPT_CLASSES
        self._placed_tokens = [0] * NUM_PROMPT_CLASSES
        self._cached_tokens = [0] * NUM_PROMPT_CLASSES
        self._num_reached = [0] * NUM_ANSWER_CLASSES
        self._num_ended = [0] * NUM_ANSWER_CLASSES
        self._ended_tokens = [0] * NUM_ANSWER_CLASSES
        self._output_tokens = self._kv_tokens = 0
        self._num_met = self._num_missed_ttft = self._num_missed_tpot = 0
        self._num_refused = self._num_failed = 0

    def arrived(self, prompt_tokens: int) -> None:
        """A request came."""
        index = prompt_class(prompt_tokens)
        self._num_arrived[index] += 1
        self._prompt_tokens[index] += prompt_tokens

    def placed(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A request goes to a worker that is expected to have ``cached_tokens`` of it."""
        index = prompt_class(prompt_tokens)
        self._placed_tokens[index] += prompt_tokens
        self._cached_tokens[index] += min(cached_tokens, prompt_tokens)

    def tokens(self, prompt_tokens: int, num_before: int, num_tokens: int) -> None:
        """A client that had ``num_before`` tokens of its answer got ``num_tokens`` more."""
        self._output_tokens += num_tokens
        self._kv_tokens += num_tokens * (prompt_tokens + num_before + num_tokens // 2)
        before = answer_class(num_before) if num_before else -1
        reached = answer_class(num_before + num_tokens)
        if reached != before:  # most tokens stay in their class
            for index in range(before + 1, reached + 1):
                self._num_reached[index] += 1

    def finished(self, num_tokens: int, *, ttft_met: bool, tpot_met: bool) -> None:
        """A client got its whole answer. Missing both targets counts as missing TTFT."""
        if num_tokens:
            index = answer_class(num_tokens)
            self._num_ended[index] += 1
            self._ended_tokens[index] += num_tokens
        if not ttft_met:
            self._num_missed_ttft += 1
        elif not tpot_met:
            self._num_missed_tpot += 1
        else:
            self._num_met += 1

    def refused(self) -> None:
        """Admission control turned a request away."""
        self._num_refused += 1

    def failed(self) -> None:
        """A request ended in an error that was not the client's."""
        self._num_failed += 1

    def summary(
        self,
        *,
        num_waiting: int,
        waiting_prompt_tokens: int,
        num_ongoing: int,
        suspects: Mapping[str, int] = MappingProxyType({}),
    ) -> TrafficSummary:
        """The counts so far, with what goes on now."""
        return TrafficSummary(
            router_id=self._router_id,
            num_arrived=tuple(self._num_arrived),
            prompt_tokens=tuple(self._prompt_tokens),
            placed_tokens=tuple(self._placed_tokens),
            cached_tokens=tuple(self._cached_tokens),
            num_reached=tuple(self._num_reached),
            num_ended=tuple(self._num_ended),
            ended_tokens=tuple(self._ended_tokens),
            output_tokens=self._output_tokens,
            kv_tokens=self._kv_tokens,
            num_met=self._num_met,
            num_missed_ttft=self._num_missed_ttft,
            num_missed_tpot=self._num_missed_tpot,
            num_refused=self._num_refused,
            num_failed=self._num_failed,
            num_waiting=num_waiting,
            waiting_prompt_tokens=waiting_prompt_tokens,
            num_ongoing=num_ongoing,
            suspects=dict(suspects),
        )
