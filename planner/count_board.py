"""How a count gets from the planner into Ray Serve: a board in an actor, and a policy that reads it.

Serve asks a deployment's autoscaling policy ten times a second how many replicas there should be, inside
its controller. The policy here answers with what the board says, and notes there what Serve goes by. Serve
keeps that number through every restart of its own; the board only has to live while the planner does.

The policy travels to the controller by value, with this whole file: it may import nothing of Baton.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from typing import Any

import ray

logger = logging.getLogger(__name__)

NAMESPACE = "baton"
_POLL_S = 0.25
_RETRY_S = 1.0


class CountBoard:
    """An actor's state: what is asked for, and what Serve goes by."""

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}
        self._wanted: dict[str, int] = {}

    async def ask(self, shape: str, num_workers: int) -> None:
        """Makes a number stand until another one is asked for."""
        self._asked[shape] = num_workers

    async def wanted(self) -> dict[str, int]:
        """The replicas that Serve works towards, of every shape whose policy has called here."""
        return dict(self._wanted)

    async def exchange(self, shape: str, wanted: int) -> int | None:
        """Called by a policy: notes what Serve goes by, says what is asked for, if anything is."""
        self._wanted[shape] = wanted
        return self._asked.get(shape)


class AskedCount:
    """Autoscaling policy of one worker deployment.

    It runs in the loop that holds Serve together, so it waits for nothing and raises nothing: without an
    answer the number stays what it is.

    Args:
        board: name of the board's actor.
    """

    def __init__(self, shape: str, board: str) -> None:
        self._shape = shape
        self._board_name = board
        self._board: Any = None
        self._answer: Future[int | None] | None = None
        self._next_look_s = 0.0
        self._asked: int | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be, and no state for Serve to keep."""
        target: int = context.target_num_replicas
        try:
            self._look(target)
        except Exception as error:  # no board yet, or it went with its planner
            logger.debug("no count board: %r", error)
            self._board = self._answer = None
            self._next_look_s = time.monotonic() + _RETRY_S
        return (target if self._asked is None else self._asked), {}

    def _look(self, target: int) -> None:
        if self._answer is not None:
            if not self._answer.done():
                return
            answer, self._answer = self._answer, None
            self._asked = answer.result()
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _POLL_S
        if self._board is None:
            self._board = ray.get_actor(self._board_name, namespace=NAMESPACE)
        self._answer = self._board.exchange.remote(self._shape, target).future()
