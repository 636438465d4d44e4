"""From a planner's history and requests' traces to its switches: how busy, and how soon at the new work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Trace = Mapping[str, Any]
"""What a router answers at /baton/requests/ID."""
Move = Mapping[str, Any]
"""One decision as a router's /baton/planner gives it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What one worker did for one request, by the router's clock."""

    sent_s: float
    begun_s: float
    """When the worker began to compute it: its wait on the worker, a KV pull included, is over."""
    done_s: float
    released_s: float
    """When the worker held nothing of it any more: a prompt's KV stays until it is pulled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """One decision's role changes; all are in one direction."""

    at_s: float
    """When it was decided, by the router's clock."""
    number: int
    """Of the decision."""
    reason: str
    split: str
    worker_ids: tuple[str, ...]
    role: str
    """The new one."""
    num_running: int
    """Requests that these workers then had in their old role, waiting ones among them."""
    num_held: int
    """...and prefilled prompts whose KV nobody had pulled from them yet."""
    first: Leg | None
    """Of the requests that were sent to them in their new role, the one that was done first; None if there
    were none."""

    @property
    def num_old(self) -> int:
        """All that the workers still had to do in their old role."""
        return self.num_running + self.num_held

    @property
    def sent_after_s(self) -> float:
        """From the decision to when that request was sent to the worker."""
        return math.inf if self.first is None else self.first.sent_s - self.at_s

    @property
    def done_after_s(self) -> float:
        """From the decision to the end of the first request in the new role."""
        return math.inf if self.first is None else self.first.done_s - self.at_s

    @property
    def service_s(self) -> float:
        """What that request took on the worker once the worker had begun with it."""
        return math.nan if self.first is None else self.first.done_s - self.first.begun_s

    @property
    def delay_s(self) -> float:
        """What is left of ``done_after_s`` without the request's own service time."""
        return math.inf if self.first is None else self.first.begun_s - self.at_s


def switches(decisions: Iterable[Move], traces: Sequence[Trace], offset_s: float) -> list[Switch]:
    """Every decision that changed roles and was carried out, in order.

    Args:
        offset_s: the router's clock less the wall clock, which decisions go by.
    """
    moves = [move for move in decisions if move["carried_out"] and move["role_changes"]]
    return [_switch(move, moves, traces, offset_s) for move in moves]


def _switch(move: Move, moves: Sequence[Move], traces: Sequence[Trace], offset_s: float) -> Switch:
    at_s = move["at_s"] + offset_s
    (role,) = {change["role"] for change in move["role_changes"]}
    worker_ids = tuple(change["worker_id"] for change in move["role_changes"])
    old: list[Leg] = []
    new: list[Leg] = []
    for worker_id in worker_ids:
        until_s = _next_change_s(moves, worker_id, move["at_s"]) + offset_s
        old += _legs(traces, worker_id, "decode" if role == "prefill" else "prefill")
        new += [leg for leg in _legs(traces, worker_id, role) if at_s <= leg.sent_s < until_s]
    return Switch(
        at_s=at_s,
        number=move["number"],
        reason=move["reason"],
        split=move["split"],
        worker_ids=worker_ids,
        role=role,
        num_running=sum(leg.sent_s <= at_s < leg.done_s for leg in old),
        num_held=sum(leg.done_s <= at_s < leg.released_s for leg in old),
        first=min(new, key=lambda leg: leg.done_s, default=None),
    )


def _next_change_s(moves: Sequence[Move], worker_id: str, after_s: float) -> float:
    later = (
        move["at_s"]
        for move in moves
        if move["at_s"] > after_s and any(change["worker_id"] == worker_id for change in move["role_changes"])
    )
    return min(later, default=math.inf)


def _legs(traces: Sequence[Trace], worker_id: str, role: str) -> Iterator[Leg]:
    """What the worker did in a role; prompts that decode workers prefill by themselves count as decoding."""
    for trace in traces:
        handoff_s = trace["handoff_sent_at_s"]
        pulled_s = None if handoff_s is None else handoff_s + trace["decode_queue_s"]
        done_s = trace["prefill_done_at_s"] if role == "prefill" else trace["last_token_at_s"]
        if trace[f"{role}_worker"] != worker_id or done_s is None:
            continue
        if role == "prefill":
            yield Leg(
                sent_s=trace["prefill_sent_at_s"],
                begun_s=done_s - trace["prefill_s"],
                done_s=done_s,
                released_s=done_s if pulled_s is None else max(done_s, pulled_s),
            )
        elif handoff_s is not None and pulled_s is not None:
            yield Leg(sent_s=handoff_s, begun_s=pulled_s, done_s=done_s, released_s=done_s)
