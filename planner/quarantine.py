"""Who is not to be trusted: workers that routers see failing, nodes on which workers keep dying.

A worker whose circuit breaker has opened again and again in at least half of the routers is quarantined:
nothing is sent there, and it is replaced. One worker of a model at a time, and never the last one that could
decode: where all look bad it is rather the network, or the routers.

Nodes are only shown: Ray chooses where a worker starts. Workers that die early there, again and again, are
started ever more slowly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from core.clock import Clock
from core.types import Role, SuspectNode, WorkerReport

OPENINGS = 6
"""Of one router's breaker for one worker within :data:`OPENINGS_WINDOW_S`. Its pauses double from one second:
a worker that was merely cut off for half a minute comes back before that."""
OPENINGS_WINDOW_S = 120.0
DEATHS = 3
"""Of a shape's workers on one node within :data:`DEATHS_WINDOW_S`."""
DEATHS_WINDOW_S = 300.0
EARLY_DEATH_S = 30.0
"""A worker that lived shorter than this may well die again."""
LONGEST_DELAY_S = 10.0


@dataclass(frozen=True, slots=True)
class _Death:
    at_s: float
    reason: str
    early: bool


class Quarantine:
    """The troubles of one cluster, as the registry hears of them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counts: dict[str, dict[str, int]] = {}
        """Openings so far, as each router last said, by incarnation."""
        self._openings: dict[tuple[str, str], deque[float]] = {}
        """When they were heard of, by (incarnation, router)."""
        self._reasons: dict[str, str] = {}
        """Of those in quarantine, by incarnation."""
        self._deaths: dict[tuple[str, str], deque[_Death]] = {}
        """By (shape, node)."""

    # Workers.

    def router_heard(self, router_id: str, suspects: Mapping[str, int]) -> None:
        """Takes a router's counts of how often it has stopped sending to each worker start."""
        now_s = self._clock.now_s()
        before = self._counts.get(router_id)
        self._counts[router_id] = dict(suspects)
        if before is None:  # it may have counted for hours; a new registry does not know when
            return
        for incarnation, count in suspects.items():
            times = self._openings.setdefault((incarnation, router_id), deque(maxlen=OPENINGS))
            times.extend([now_s] * min(OPENINGS, count - before.get(incarnation, 0)))

    def router_left(self, router_id: str) -> None:
        """Forgets a router and what it said."""
        self._counts.pop(router_id, None)
        for key in [key for key in self._openings if key[1] == router_id]:
            del self._openings[key]

    def review(self, reports: Iterable[WorkerReport]) -> Mapping[str, str]:
        """Decides who is in quarantine among the present workers. Who is stays until it has gone.

        Returns:
            Reasons by incarnation.
        """
        present = {report.incarnation: report for report in reports}
        self._reasons = {key: why for key, why in self._reasons.items() if key in present}
        self._openings = {key: times for key, times in self._openings.items() if key[0] in present}
        for incarnation in dict.fromkeys(key[0] for key in self._openings):
            num_routers = self._num_routers_against(incarnation)
            if not num_routers or 2 * num_routers < len(self._counts):
                continue
            if incarnation in self._reasons or present[incarnation].draining:
                continue
            if self._can_spare(present[incarnation], present.values()):
                self._reasons[incarnation] = (
                    f"{num_routers} of {len(self._counts)} routers stopped sending to it {OPENINGS} times "
                    f"within {OPENINGS_WINDOW_S:g} s"
                )
        return self._reasons

    def _num_routers_against(self, incarnation: str) -> int:
        since_s = self._clock.now_s() - OPENINGS_WINDOW_S
        return sum(
            len(times) == OPENINGS and times[0] > since_s
            for (suspect, _), times in self._openings.items()
            if suspect == incarnation
        )

    def _can_spare(self, report: WorkerReport, present: Iterable[WorkerReport]) -> bool:
        others = [each for each in present if each.model == report.model and each is not report]
        if any(each.incarnation in self._reasons for each in others):
            return False
        return any(
            Role.DECODE in each.allowed_roles and not each.draining and not each.trouble for each in others
        )

    # Nodes.

    def died(self, shape: str, node_id: str, reason: str, lived_s: float) -> None:
        """A worker is gone that should be there.

        Args:
            lived_s: 0 if it could not even start.
        """
        deaths = self._deaths.setdefault((shape, node_id), deque())
        deaths.append(_Death(self._clock.now_s(), reason, lived_s < EARLY_DEATH_S))

    def suspect_nodes(self) -> tuple[SuspectNode, ...]:
        """Where workers of a shape have died :data:`DEATHS` times lately."""
        return tuple(
            SuspectNode(shape=shape, node_id=node_id, num_deaths=len(deaths), last_reason=deaths[-1].reason)
            for shape, node_id in sorted(self._deaths)
            if len(deaths := self._recent(shape, node_id)) >= DEATHS
        )

    def start_delay_s(self, shape: str, node_id: str) -> float:
        """How long a worker waits before it starts: longer and longer where the ones before died early."""
        num_early = sum(death.early for death in self._recent(shape, node_id))
        return 0.0 if num_early < DEATHS else min(LONGEST_DELAY_S, 2.0 ** (num_early - DEATHS))

    def _recent(self, shape: str, node_id: str) -> deque[_Death]:
        deaths = self._deaths.get((shape, node_id), deque())
        while deaths and deaths[0].at_s <= self._clock.now_s() - DEATHS_WINDOW_S:
            deaths.popleft()
        return deaths
