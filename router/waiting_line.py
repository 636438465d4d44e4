"""The order in which waiting requests are sent.

1. Priority class: lower first. A request moves up one class every ``aging_s``, without end, so that
   nothing that arrives more than ``(p - q + 1) * aging_s`` after a request of priority ``p`` goes before
   it, if ``q`` is the most urgent priority in use: from then on it stays in a class above the newcomer's.
2. Fair share: each tenant's work is counted, divided by its weight, as it is sent (start-time fair
   queueing, Goyal et al. 1996). A tenant that begins to wait starts level with the least served one.
   Tenants more than a quantum ahead of that one stand back.
3. The earliest deadline among the others; of equals, the first to come.

What is counted is forgotten when a class runs empty: nobody is owed anything for times without a queue.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_MIN_ACCOUNTS = 64
"""Accounts of tenants that do not wait are kept up to this many."""


@dataclass(slots=True, kw_only=True, eq=False)
class Entry(Generic[T]):
    """One that waits."""

    item: T
    tenant: str
    priority: int
    """The class it is in now; lower is more urgent."""
    deadline_s: float
    work: float
    """What sending it costs; not negative."""
    order: int = 0
    """Given by the line: who came first."""
    waiting: bool = False
    """In line."""


@dataclass(slots=True)
class _Backlog(Generic[T]):
    """One tenant's entries in one class, the earliest deadline first; lists of one length."""

    keys: list[tuple[float, int]] = field(default_factory=list)
    entries: list[Entry[T]] = field(default_factory=list)
    works: list[float] = field(default_factory=list)

    def add(self, entry: Entry[T]) -> None:
        key = entry.deadline_s, entry.order
        index = bisect_left(self.keys, key)
        self.keys.insert(index, key)
        self.entries.insert(index, entry)
        self.works.insert(index, entry.work)

    def remove(self, entry: Entry[T]) -> None:
        index = bisect_left(self.keys, (entry.deadline_s, entry.order))
        assert self.entries[index] is entry
        del self.keys[index], self.entries[index], self.works[index]

    def work(self) -> float:
        return math.fsum(self.works)

    def work_before(self, deadline_s: float) -> float:
        """Of entries that do not have a later deadline."""
        return sum(self.works[: bisect_left(self.keys, (deadline_s, math.inf))])


class _PriorityClass(Generic[T]):
    """Entries of one class. Served work is counted by tenant, in units of the tenant's weight."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._served: dict[str, float] = {}
        self.backlogs: dict[str, _Backlog[T]] = {}

    def add(self, entry: Entry[T]) -> None:
        backlog = self.backlogs.get(entry.tenant)
        if backlog is None:
            self._served[entry.tenant] = self._starts_at(entry.tenant)
            backlog = self.backlogs[entry.tenant] = _Backlog()
        backlog.add(entry)

    def remove(self, entry: Entry[T]) -> None:
        backlog = self.backlogs[entry.tenant]
        backlog.remove(entry)
        if not backlog.entries:
            del self.backlogs[entry.tenant]
            if len(self._served) > max(_MIN_ACCOUNTS, 2 * len(self.backlogs)):
                self._forget_those_behind()

    def charge(self, entry: Entry[T]) -> None:
        self._served[entry.tenant] += entry.work / self._weight(entry.tenant)

    def in_order(self, quantum: float) -> Iterator[Entry[T]]:
        """As they would be sent one after the other, nothing else happening."""
        if len(self.backlogs) == 1:
            (backlog,) = self.backlogs.values()
            yield from backlog.entries
            return
        served = {tenant: self._served[tenant] for tenant in self.backlogs}
        positions = dict.fromkeys(served, 0)
        while served:
            limit = min(served.values()) + quantum
            _, tenant = min(
                (self.backlogs[tenant].keys[positions[tenant]], tenant)
                for tenant, so_far in served.items()
                if so_far <= limit
            )
            backlog, position = self.backlogs[tenant], positions[tenant]
            yield backlog.entries[position]
            served[tenant] += backlog.works[position] / self._weight(tenant)
            positions[tenant] += 1
            if positions[tenant] == len(backlog.entries):
                del served[tenant]

    def work(self) -> float:
        return sum(backlog.work() for backlog in self.backlogs.values())

    def work_ahead(self, tenant: str, deadline_s: float, quantum: float) -> float:
        """Work that will be sent before a newcomer of this tenant, if nobody else comes."""
        own = self.backlogs.get(tenant)
        ahead = own.work_before(deadline_s) if own is not None else 0.0
        served = self._served[tenant] if own is not None else self._starts_at(tenant)
        turn = served + ahead / self._weight(tenant)
        for other, backlog in self.backlogs.items():
            if other == tenant:
                continue
            behind, weight = turn - self._served[other], self._weight(other)
            in_any_case = min(backlog.work(), weight * max(0.0, behind - quantum))
            if behind > -quantum:
                in_time = min(backlog.work_before(deadline_s), weight * (behind + quantum))
                in_any_case = max(in_any_case, in_time)
            ahead += in_any_case
        return ahead

    def least_entitled(self) -> tuple[str, float]:
        """The tenant with the most work waiting for its weight, and how much that is."""
        waiting = {tenant: backlog.work() / self._weight(tenant) for tenant, backlog in self.backlogs.items()}
        tenant = max(waiting, key=lambda name: (waiting[name], name))
        return tenant, waiting[tenant]

    def waiting_of(self, tenant: str, more: float) -> float:
        """A tenant's waiting work with ``more``, for its weight."""
        backlog = self.backlogs.get(tenant)
        return ((backlog.work() if backlog else 0.0) + more) / self._weight(tenant)

    def _starts_at(self, tenant: str) -> float:
        """Where the count of a tenant begins that has nothing waiting."""
        least = min((self._served[other] for other in self.backlogs), default=0.0)
        return max(least, self._served.get(tenant, least))

    def _forget_those_behind(self) -> None:
        least = min((self._served[tenant] for tenant in self.backlogs), default=math.inf)
        self._served = {
            tenant: served
            for tenant, served in self._served.items()
            if tenant in self.backlogs or served > least
        }

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)


class WaitingLine(Generic[T]):
    """Entries in the order above.

    Args:
        aging_s: see there.
        quantum: in units of work.
        weights: of tenants; 1 for those not named.
    """

    def __init__(self, *, aging_s: float, quantum: float, weights: Mapping[str, float]) -> None:
        self.quantum = quantum
        """May be changed at any time."""
        self._aging_s = aging_s
        self._weights = weights
        self._classes: dict[int, _PriorityClass[T]] = {}
        self._promotions: list[tuple[float, int, Entry[T]]] = []
        self._num = 0
        self._num_ever = 0

    def __len__(self) -> int:
        return self._num

    def add(self, entry: Entry[T], now_s: float) -> None:
        """It waits from now on."""
        self._num_ever += 1
        entry.order = self._num_ever
        entry.waiting = True
        self._num += 1
        self._put(entry)
        heapq.heappush(self._promotions, (now_s + self._aging_s, entry.order, entry))

    def remove(self, entry: Entry[T], *, sent: bool) -> None:
        """It waits no more; what is sent counts for its tenant."""
        entry.waiting = False
        self._num -= 1
        if sent:
            self._classes[entry.priority].charge(entry)
        self._take(entry)
        if not self._num:
            self._promotions.clear()

    def age(self, now_s: float) -> None:
        """Moves up those that have waited long enough."""
        promotions = self._promotions
        while promotions and promotions[0][0] <= now_s:
            time_s, order, entry = heapq.heappop(promotions)
            if entry.waiting:
                self._take(entry)
                entry.priority -= 1
                self._put(entry)
                heapq.heappush(promotions, (time_s + self._aging_s, order, entry))

    def in_order(self) -> Iterator[Entry[T]]:
        """All, as they would be sent. The line must not change meanwhile."""
        for priority in sorted(self._classes):
            yield from self._classes[priority].in_order(self.quantum)

    def work_ahead(self, tenant: str, priority: int, deadline_s: float) -> float:
        """Work that will be sent before a newcomer, if nobody else comes."""
        work = sum(queue.work() for other, queue in self._classes.items() if other < priority)
        if (own := self._classes.get(priority)) is not None:
            work += own.work_ahead(tenant, deadline_s, self.quantum)
        return work

    def work(self) -> float:
        """Of all that wait."""
        return sum(queue.work() for queue in self._classes.values())

    def to_displace(self, tenant: str, priority: int, work: float) -> Entry[T] | None:
        """Who makes place for a newcomer in a full line: one of a lower class, or of a tenant of its class
        that has more waiting than the newcomer's would have. None: nobody does."""
        last = max(self._classes, default=priority)
        if last < priority or last not in self._classes:
            return None
        queue = self._classes[last]
        victim, waiting = queue.least_entitled()
        if last == priority and (victim == tenant or waiting <= queue.waiting_of(tenant, work)):
            return None
        return queue.backlogs[victim].entries[-1]

    def _put(self, entry: Entry[T]) -> None:
        if entry.priority not in self._classes:
            self._classes[entry.priority] = _PriorityClass(self._weights)
        self._classes[entry.priority].add(entry)

    def _take(self, entry: Entry[T]) -> None:
        queue = self._classes[entry.priority]
        queue.remove(entry)
        if not queue.backlogs:
            del self._classes[entry.priority]
