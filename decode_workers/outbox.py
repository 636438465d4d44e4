"""One router's mailbox on a worker: deltas of all its requests leave together, a frame at a time.

The engine's outputs of one step arrive within one turn of the event loop, so the frame that the next
turn sends holds the whole step: one gRPC message a step and router instead of one a token.
"""

from __future__ import annotations

import asyncio

from baton_proto import worker_pb2


class Outbox:
    """Deltas on their way to one router, and the tasks that produce them."""

    def __init__(self) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._deltas: list[worker_pb2.Delta] = []
        self._filled = asyncio.Event()
        self.closed = False

    def push(self, delta: worker_pb2.Delta) -> None:
        self._deltas.append(delta)
        self._filled.set()

    async def take(self, timeout_s: float) -> list[worker_pb2.Delta]:
        """Waits for at least one delta and takes all there are; none after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._filled.wait()
        except TimeoutError:
            return []
        await asyncio.sleep(0)  # let the rest of this step's deltas arrive
        deltas, self._deltas = self._deltas, []
        self._filled.clear()
        return deltas

    async def close(self) -> None:
        """Cancels everything the router had running here and waits until it is gone."""
        self.closed = True
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
