"""Who may enter a worker: counts what it holds, refuses when it drains or is full."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import Draining, Overloaded


class Gate:
    """One per worker, shared by its two legs.

    Args:
        max_requests: requests held at once, queued ones included.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._num_inside = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def num_inside(self) -> int:
        return self._num_inside

    def check(self) -> None:
        """
        Raises:
            Draining: the worker takes nothing new.
            Overloaded: it holds ``max_requests`` already.
        """
        if self.draining:
            raise Draining("the worker is draining")
        if self._num_inside >= self._max_requests:
            raise Overloaded(f"the worker already holds {self._num_inside} requests")

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Holds one place; raises as :meth:`check` does."""
        self.check()
        with self.hold():
            yield

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Holds one place for a request that was let in before."""
        self._num_inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            if not self._num_inside:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for what is inside.

        Returns:
            True if the worker is empty, False if ``timeout_s`` passed first.
        """
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
