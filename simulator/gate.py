"""Admission control on the virtual clock."""

from __future__ import annotations

from router.admission import AdmissionController
from router.admission_limits import AdmissionLimits
from router.applicant import Applicant
from router.placement import Placement
from simulator.event_queue import EventQueue


class Gate:
    """One router's waiting line, and when it is looked at.

    Args:
        rest_s: from one look at the line to the next at least; news that come meanwhile wait for it.
    """

    def __init__(self, limits: AdmissionLimits, queue: EventQueue, rest_s: float = 0.0) -> None:
        self.limits = limits
        self._queue = queue
        self._rest_s = rest_s
        self._rests_until_s = 0.0
        self._controller = AdmissionController(limits, self)
        self.lateness = self._controller.lateness
        self._due_s = float("inf")
        """The earliest time at which an update is scheduled."""

    def now_s(self) -> float:
        """The virtual clock."""
        return self._queue.now_s

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return self._controller.num_waiting

    @property
    def waiting_prompt_tokens(self) -> int:
        """...and their prompt tokens."""
        return self._controller.waiting_prompt_tokens

    def offer(self, applicant: Applicant) -> Placement | None:
        """See :meth:`router.admission.AdmissionController.offer`."""
        placement = self._controller.offer(applicant)
        if placement is None:
            self._update_at(self._controller.next_update_s())
        return placement

    def news(self) -> None:
        """Something was heard of the workers: there may be room, once this event is over."""
        if self._controller.num_waiting:
            self._update_at(self._queue.now_s)

    def _update_at(self, time_s: float) -> None:
        time_s = max(time_s, self._rests_until_s)
        if time_s < self._due_s:
            self._due_s = time_s
            self._queue.at(time_s, self._update)

    def _update(self, now_s: float) -> None:
        if now_s < self._due_s:
            return  # an earlier one has come and gone
        self._due_s = float("inf")
        self._rests_until_s = now_s + self._rest_s
        self._controller.update()
        self._update_at(self._controller.next_update_s())
