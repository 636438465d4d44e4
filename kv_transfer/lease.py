"""Leases on another node's clock.

A prefill worker pins KV until a moment of its own monotonic clock. A puller must stop trusting the
blocks before that moment, on its own clock, however long messages took and however long either side
was stopped in between. An anchor does that without a round trip per request: the peer read its clock
(``peer_now_s``) some time after the question was sent (``sent_at_s``), so the peer's moment T is never
earlier here than ``sent_at_s + (T - peer_now_s)``. Taking exactly that as the deadline is conservative
by at most one round trip. Clocks drift, so an anchor ages: its deadlines move earlier with its age,
and after ``MAX_ANCHOR_AGE_S`` a new one is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DRIFT = 500e-6
"""Seconds per second two nodes' clocks may drift apart: NTP never slews faster than this."""
MAX_ANCHOR_AGE_S = 60.0


@dataclass(frozen=True, slots=True)
class ClockAnchor:
    """One reading of a peer's clock, seen from here. All fields in seconds."""

    sent_at_s: float
    """When the question left, on this node's clock."""
    peer_now_s: float
    """What the peer's clock said when it answered."""

    def is_fresh(self, now_s: float) -> bool:
        return now_s - self.sent_at_s <= MAX_ANCHOR_AGE_S

    def deadline_s(self, expires_at_s: float) -> float:
        """The latest moment on this node's clock at which the lease surely still holds.

        Args:
            expires_at_s: end of the lease on the peer's clock.
        """
        ahead_s = expires_at_s - self.peer_now_s
        return self.sent_at_s + ahead_s - abs(ahead_s) * MAX_DRIFT


class ClockAnchors:
    """The latest anchor of each peer engine start, bounded in number.

    Args:
        max_peers: least recently set anchors beyond this many are forgotten.
    """

    def __init__(self, max_peers: int = 4096) -> None:
        self._by_incarnation: dict[str, ClockAnchor] = {}
        self._max_peers = max_peers

    def set(self, incarnation: str, anchor: ClockAnchor) -> None:
        self._by_incarnation.pop(incarnation, None)
        self._by_incarnation[incarnation] = anchor
        if len(self._by_incarnation) > self._max_peers:
            del self._by_incarnation[next(iter(self._by_incarnation))]

    def fresh(self, incarnation: str, now_s: float) -> ClockAnchor | None:
        """The peer's anchor if it is young enough to be used."""
        anchor = self._by_incarnation.get(incarnation)
        return anchor if anchor is not None and anchor.is_fresh(now_s) else None
