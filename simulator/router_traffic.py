"""What a simulated router tells the planner of its requests."""

from __future__ import annotations

from typing import Protocol

from core.traffic import TrafficSummary
from router.traffic_counter import TrafficCounter


class OngoingRequest(Protocol):
    """A request in flight."""

    @property
    def prompt_tokens(self) -> int: ...

    def num_tokens_at(self, now_s: float) -> int:
        """Tokens that its client has got."""


class Line(Protocol):
    """Requests that admission control holds back."""

    @property
    def num_waiting(self) -> int: ...

    @property
    def waiting_prompt_tokens(self) -> int: ...


class RouterTraffic:
    """Counts as a router does, but looks at answers that go on only when a summary is due."""

    __slots__ = ("_ongoing", "counter", "said", "said_at_s")

    def __init__(self, router_id: str) -> None:
        self.counter = TrafficCounter(router_id)
        self.said: TrafficSummary | None = None
        """The last summary that was sent to the registry."""
        self.said_at_s = 0.0
        self._ongoing: dict[OngoingRequest, int] = {}
        """With the tokens counted so far."""

    def arrived(self, request: OngoingRequest) -> None:
        """A request is here."""
        self._ongoing[request] = 0
        self.counter.arrived(request.prompt_tokens)

    def ended(self, request: OngoingRequest, num_tokens: int) -> None:
        """It got this many tokens; how it ended is the counter's to be told."""
        num_counted = self._ongoing.pop(request)
        if num_tokens > num_counted:
            self.counter.tokens(request.prompt_tokens, num_counted, num_tokens - num_counted)

    def say(self, now_s: float, line: Line | None) -> None:
        """Sends a summary to the registry."""
        for request, num_counted in self._ongoing.items():
            num_tokens = request.num_tokens_at(now_s)
            if num_tokens > num_counted:
                self.counter.tokens(request.prompt_tokens, num_counted, num_tokens - num_counted)
                self._ongoing[request] = num_tokens
        self.said_at_s = now_s
        self.said = self.counter.summary(
            num_waiting=0 if line is None else line.num_waiting,
            waiting_prompt_tokens=0 if line is None else line.waiting_prompt_tokens,
            num_ongoing=len(self._ongoing),
        )
