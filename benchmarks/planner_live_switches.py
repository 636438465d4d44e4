"""From a planner's history and requests' traces to its switches: how busy, and how soon at the new work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Trace = Mapping[str, Any]
"""What a router answers at /baton/requests/ID."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What one worker did for one request, by the router's clock."""

    sent_s: float
    begun_s: float
    """When the worker began to compute it: its wait on the worker, a KV pull included, is over."""
    done_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """One worker's change of role."""

    at_s: float
    """When it was decided, by the router's clock."""
    number: int
    """Of the decision."""
    reason: str
    split: str
    worker_id: str
    role: str
    """The new one."""
    num_running: int
    """Requests that the worker then had in its old role, waiting ones among them."""
    first: Leg | None
    """Of the requests that were sent to it in its new role, the one that was done first; None if there were
    none before it changed again."""

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


def switches(decisions: Iterable[Mapping[str, Any]], traces: Sequence[Trace], offset_s: float) -> list[Switch]:
    """Every role change that was carried out, in order.

    Args:
        decisions: as a router's /baton/planner gives them, their times on the wall clock.
        offset_s: the router's clock less the wall clock.
    """
    moves = [move for move in decisions if move["carried_out"]]
    found = []
    for move in moves:
        at_s = move["at_s"] + offset_s
        for change in move["role_changes"]:
            worker_id, role = change["worker_id"], change["role"]
            until_s = _next_change_s(moves, worker_id, move["at_s"]) + offset_s
            old = list(_legs(traces, worker_id, "decode" if role == "prefill" else "prefill"))
            new = [leg for leg in _legs(traces, worker_id, role) if at_s <= leg.sent_s < until_s]
            found.append(
                Switch(
                    at_s=at_s,
                    number=move["number"],
                    reason=move["reason"],
                    split=move["split"],
                    worker_id=worker_id,
                    role=role,
                    num_running=sum(leg.sent_s <= at_s < leg.done_s for leg in old),
                    first=min(new, key=lambda leg: leg.done_s, default=None),
                )
            )
    return found


def _next_change_s(moves: Sequence[Mapping[str, Any]], worker_id: str, after_s: float) -> float:
    later = (
        move["at_s"]
        for move in moves
        if move["at_s"] > after_s and any(change["worker_id"] == worker_id for change in move["role_changes"])
    )
    return min(later, default=math.inf)


def _legs(traces: Sequence[Trace], worker_id: str, role: str) -> Iterator[Leg]:
    """What the worker did in a role; prompts that decode workers prefill by themselves count as decoding."""
    for trace in traces:
        if role == "prefill" and trace["prefill_worker"] == worker_id and trace["prefill_done_at_s"] is not None:
            sent_s, done_s = trace["prefill_sent_at_s"], trace["prefill_done_at_s"]
            yield Leg(sent_s=sent_s, begun_s=done_s - trace["prefill_s"], done_s=done_s)
        if role == "decode" and trace["decode_worker"] == worker_id and trace["last_token_at_s"] is not None:
            sent_s = trace["handoff_sent_at_s"]
            yield Leg(
                sent_s=sent_s, begun_s=sent_s + trace["decode_queue_s"], done_s=trace["last_token_at_s"]
            )
