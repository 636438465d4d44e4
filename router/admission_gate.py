"""Where requests wait until admission control lets them through."""

from __future__ import annotations

import asyncio
import logging

from core.clock import Clock
from router.admission import AdmissionController
from router.placing import Placing
from router.routing import Decision

logger = logging.getLogger(__name__)

_GATHER_S = 0.002
"""Workers speak many times a second: their words are taken together."""
_RETRY_S = 0.1
_REST = 4.0
"""After a look at the line the event loop has so many times as long for everything else: tokens first."""


class AdmissionGate:
    """The event loop's side of an :class:`AdmissionController`; make it on the loop it is to run on."""

    def __init__(self, controller: AdmissionController, clock: Clock) -> None:
        self._controller = controller
        self.lateness = controller.lateness
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = float("inf")
        self._rests_until_s = 0.0

    @property
    def num_waiting(self) -> int:
        return self._controller.num_waiting

    @property
    def waiting_prompt_tokens(self) -> int:
        return self._controller.waiting_prompt_tokens

    async def enter(self, request: Placing) -> Decision:
        """Waits until there is room for a request.

        Raises:
            core.errors.Rejected: it is refused.
            core.errors.NoWorkerAvailable: nobody serves it.
        """
        placement = self._controller.offer(request)
        if placement is not None:
            request.send(placement)
        else:
            self._wake_in(self._controller.next_update_s() - self._clock.now_s())
        try:
            return await request.sent
        except asyncio.CancelledError:
            self._controller.withdraw(request.request_id)
            raise

    def news(self) -> None:
        """Something was heard of the workers: there may be room now."""
        if self._controller.num_waiting:
            self._wake_in(_GATHER_S)

    def _wake_in(self, seconds: float) -> None:
        if seconds == float("inf"):
            return
        loop = asyncio.get_running_loop()
        due_s = max(loop.time() + seconds, self._rests_until_s)
        if self._timer is not None:
            if self._due_s <= due_s:
                return
            self._timer.cancel()
        self._due_s, self._timer = due_s, loop.call_at(due_s, self._update)

    def _update(self) -> None:
        """Called by a timer: whatever goes wrong here, those that wait are looked at again."""
        self._timer = None
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            self._controller.update()
        except Exception:
            logger.exception("admission control stumbled")
            self._wake_in(_RETRY_S)
        self._rests_until_s = loop.time() + _REST * (loop.time() - began_s)
        self._wake_in(self._controller.next_update_s() - self._clock.now_s())
