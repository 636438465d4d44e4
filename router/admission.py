"""Admission control: which request is sent to the workers next, which waits, which is refused.

    offer ──> room, and nobody in front could use it ──────> sent
      │
      ├─────> line full, or too late by the time of its turn ──> Rejected (429)
      │
      └─────> waits in line ── update ──> room ───────────> sent
                                  └─────> too late, waited too long, displaced ──> Rejected (503)

No work is done for a request before it is sent. The order of the line is :mod:`router.waiting_line`'s:
priority with ageing, fair share of tenants, earliest deadline. Each router has a line of its own; what
other routers send shows in the workers' loads and in how fast this line drains.
"""

from __future__ import annotations

import heapq
import math
from itertools import islice

from core.clock import Clock
from core.errors import NoWorkerAvailable, Rejected
from router.admission_limits import AdmissionLimits
from router.applicant import Applicant
from router.drain_rate import DrainRate
from router.lateness import Lateness
from router.placement import Placement
from router.waiting_line import Entry, WaitingLine

_NOMINAL_TOKENS_PER_S = 10_000
"""Turns prompt tokens into seconds of work where no step times are known."""
_NUM_LOOKED_AT = 64
_NUM_TRIED = 8
"""Requests in front of the line that are tried: one that waits for its worker does not block the others."""
_MIN_RETRY_S = 0.001
_MIN_RETRY_AFTER_S, _MAX_RETRY_AFTER_S = 1, 60


class AdmissionController:
    """One router's, for one model. Not thread-safe; nothing in it waits.

    Args:
        limits: see there.
        clock: the one that arrivals are told on.
    """

    def __init__(self, limits: AdmissionLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._line: WaitingLine[Applicant] = WaitingLine(
            aging_s=limits.aging_s, quantum=0.0, weights=limits.tenant_weights
        )
        self._entries: dict[str, Entry[Applicant]] = {}
        self._ends: list[tuple[float, int, Entry[Applicant]]] = []
        """When waiting any longer is no use."""
        self._room_at_s = math.inf
        """When one of those in front may have room."""
        self._drain = DrainRate()
        self.lateness = Lateness(limits, clock)
        """To be told of first tokens and of answers."""

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    @property
    def waiting_prompt_tokens(self) -> int:
        """Prompt tokens of the requests in line."""
        return sum(entry.item.prompt_tokens for entry in self._entries.values())

    def offer(self, applicant: Applicant) -> Placement | None:
        """A request has arrived.

        Returns:
            Where it goes at once (the caller books it before it calls anything here again; neither
            ``send`` nor ``refuse`` is called); None: it waits, and one of the two will be called, by
            :meth:`update` or by a later :meth:`offer` that displaces it.

        Raises:
            core.errors.Rejected: refused, no work has been done for it.
            core.errors.NoWorkerAvailable: nobody serves it.
        """
        now_s = self._clock.now_s()
        placement = applicant.place(now_s)
        late_s = self.lateness.late_s(applicant, placement, now_s)
        goes = placement.has_room and late_s + self.lateness.margin_s(applicant, placement, now_s) <= 0.0
        if goes and not self._line:
            return placement
        self._prepare(now_s)
        entry = self._entry(applicant, placement)
        wait_s = self._wait_s(entry, now_s)
        if late_s + wait_s > 0:
            raise self._rejected("too_late", 429, late_s + wait_s)
        if len(self._line) >= self._limits.max_queue_requests:
            self._make_place(entry)
        self._enter(entry, placement, now_s)
        if goes and entry in islice(self._line.in_order(), _NUM_TRIED):
            self._leave(entry, now_s, sent=True)
            return placement
        return None

    def update(self) -> None:
        """Sends what there is room for and refuses what is too late.

        To be called whenever workers may have room (an answer came, a load was heard of, a snapshot came)
        while ``num_waiting`` is not 0, and at :meth:`next_update_s`.
        """
        if not self._line:
            return
        now_s = self._clock.now_s()
        self._prepare(now_s)
        self._refuse_ended(now_s)
        while self._send_some(self._clock.now_s()):
            pass

    def withdraw(self, request_id: str) -> None:
        """The client has gone; unknown and ended ones are passed over."""
        if (entry := self._entries.get(request_id)) is not None:
            self._leave(entry, self._clock.now_s(), sent=False)

    def next_update_s(self) -> float:
        """When :meth:`update` has something to do even if nothing is heard; inf if nobody waits."""
        ends = self._ends
        while ends and not ends[0][2].waiting:
            heapq.heappop(ends)
        return min(self._room_at_s, ends[0][0]) if ends else math.inf

    # ---------------------------------------------------------------------------------------- in line

    def _prepare(self, now_s: float) -> None:
        self._line.age(now_s)
        self._line.quantum = self._limits.fair_quantum_s * (self._drain.per_s(now_s) or 0.0)

    def _send_some(self, now_s: float) -> bool:
        """Tries those in front; True if that changed the line, so that others are in front now."""
        self._room_at_s = math.inf
        changed = False
        for entry in self._to_try(now_s):
            applicant = entry.item
            try:
                placement = applicant.place(now_s)
            except NoWorkerAvailable as error:
                self._leave(entry, now_s, sent=False)
                applicant.refuse(error)
                changed = True
                continue
            if not placement.has_room:
                room_at_s = now_s + max(placement.room_in_s, _MIN_RETRY_S)
                self._room_at_s = min(self._room_at_s, room_at_s)
                continue
            late_s = self.lateness.late_s(applicant, placement, now_s)
            if late_s <= 0.0 < late_s + self.lateness.margin_s(applicant, placement, now_s):
                continue  # in time perhaps: it waits for a worker that has less to do
            changed = True
            self._leave(entry, now_s, sent=late_s <= 0.0)
            if late_s <= 0.0:
                applicant.send(placement)
            else:
                applicant.refuse(self._rejected("too_late", 503, self._whole_wait_s(now_s)))
        return changed

    def _to_try(self, now_s: float) -> list[Entry[Applicant]]:
        """The first few in line that are still sure to be in time, then those of which it is doubtful.

        Under load those with the earliest deadlines are hopeless before long: they must not hold up the rest.
        """
        sure: list[Entry[Applicant]] = []
        doubtful: list[Entry[Applicant]] = []
        for entry in islice(self._line.in_order(), _NUM_LOOKED_AT):
            (sure if self.lateness.surely_in_time(entry, now_s) else doubtful).append(entry)
            if len(sure) == _NUM_TRIED:
                break
        return sure + doubtful[:_NUM_TRIED]

    def _refuse_ended(self, now_s: float) -> None:
        ends = self._ends
        while ends and ends[0][0] <= now_s:
            entry = heapq.heappop(ends)[2]
            if entry.waiting:
                waited_out = now_s - entry.item.arrival_s >= self._limits.max_wait_s
                self._leave(entry, now_s, sent=False)
                reason = "waited_too_long" if waited_out else "too_late"
                entry.item.refuse(self._rejected(reason, 503, self._whole_wait_s(now_s)))

    def _make_place(self, newcomer: Entry[Applicant]) -> None:
        """
        Raises:
            core.errors.Rejected: the line is full of those that go before it.
        """
        now_s = self._clock.now_s()
        victim = self._line.to_displace(newcomer.tenant, newcomer.priority, newcomer.work)
        if victim is None:
            raise self._rejected("queue_full", 429, self._whole_wait_s(now_s))
        self._leave(victim, now_s, sent=False)
        victim.item.refuse(self._rejected("displaced", 503, self._whole_wait_s(now_s)))

    def _entry(self, applicant: Applicant, placement: Placement) -> Entry[Applicant]:
        bound = self._limits.max_priority
        work_s = placement.work_s
        return Entry(
            item=applicant,
            tenant=applicant.tenant,
            priority=max(-bound, min(bound, applicant.priority)),
            deadline_s=applicant.arrival_s + self.lateness.patience_s(applicant, placement),
            work=applicant.prompt_tokens / _NOMINAL_TOKENS_PER_S if work_s is None else work_s,
        )

    def _enter(self, entry: Entry[Applicant], placement: Placement, now_s: float) -> None:
        self._line.add(entry, now_s)
        self._drain.begin(now_s)
        applicant = entry.item
        self._entries[applicant.request_id] = entry
        end_s = applicant.arrival_s + self._limits.max_wait_s
        if self._limits.early_rejection:
            end_s = min(end_s, entry.deadline_s - (placement.work_s or 0.0))
        heapq.heappush(self._ends, (end_s, entry.order, entry))
        if not placement.has_room:
            self._room_at_s = min(self._room_at_s, now_s + max(placement.room_in_s, _MIN_RETRY_S))

    def _leave(self, entry: Entry[Applicant], now_s: float, *, sent: bool) -> None:
        self._line.remove(entry, sent=sent)
        del self._entries[entry.item.request_id]
        if sent:
            self._drain.sent(now_s, entry.work)
        if not self._line:
            self._drain.end(now_s)
            self._ends.clear()
            self._room_at_s = math.inf

    # ----------------------------------------------------------------------------- waits and refusals

    def _wait_s(self, newcomer: Entry[Applicant], now_s: float) -> float:
        """Until it is a newcomer's turn."""
        per_s = self._drain.per_s(now_s)
        if per_s is None:
            return 0.0
        ahead = self._line.work_ahead(newcomer.tenant, newcomer.priority, newcomer.deadline_s)
        return ahead / per_s

    def _whole_wait_s(self, now_s: float) -> float:
        """Until all that wait have been sent."""
        per_s = self._drain.per_s(now_s)
        return 0.0 if per_s is None else self._line.work() / per_s

    def _rejected(self, reason: str, status: int, wait_s: float) -> Rejected:
        wait_s = min(max(wait_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)
        retry_after_s = math.ceil(wait_s)
        return Rejected(
            f"{_WHY[reason]}; try again in {retry_after_s} s",
            reason=reason,
            status=status,
            retry_after_s=retry_after_s,
        )


_WHY = {
    "too_late": "the cluster is too busy to answer in time",
    "queue_full": "too many requests wait already",
    "displaced": "more urgent requests took its place in the queue",
    "waited_too_long": "no worker had room in time",
}
