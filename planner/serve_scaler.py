"""Worker counts on Ray Serve: the planner's scaler."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from core.errors import ScalingError
from planner.count_board import NAMESPACE, CountBoard
from planner.settings import PlannedShape

_POLL_S = 0.05


class ServeScaler:
    """Asks Ray Serve for more or fewer workers.

    Serve starts them when there is room for them. Whom it stops is its choice; that worker drains itself.
    What was asked for stands until something else is: asking again changes nothing, and a failed call may be
    repeated. Shapes whose ``min_workers`` and ``max_workers`` are equal always have that many.

    Args:
        board: name of the actor between this and Serve; the worker deployments' policies know it.
        gpu_budget: most GPUs all workers together may hold.
        timeout_s: longest wait in a call.
    """

    def __init__(
        self,
        shapes: Sequence[PlannedShape],
        *,
        board: str,
        gpu_budget: float | None = None,
        timeout_s: float = 2.5,
    ) -> None:
        self._shapes = {shape.name: shape for shape in shapes}
        self._elastic = {s.name for s in shapes if s.min_workers < s.max_workers}
        self._board_name = board
        self._board: Any = None
        self._gpu_budget = gpu_budget
        self._timeout_s = timeout_s
        self._one_at_a_time = asyncio.Lock()

    async def wanted(self) -> Mapping[str, int]:
        """The workers by shape that Serve works towards, also those that cannot start yet.

        Raises:
            ScalingError: Serve has not said so in time.
        """
        return await self._within_time(self._wanted(), "has not said how many workers it wants")

    async def ask(self, shape: str, num_workers: int) -> None:
        """Makes ``num_workers`` what Serve works towards; returns when it does.

        Raises:
            ValueError: no such shape, a number it may not have, or more GPUs than the budget.
            ScalingError: Serve has not taken it up in time. It stands all the same.
        """
        self._check_range(shape, num_workers)
        if shape not in self._elastic:
            return
        await self._within_time(
            self._ask(shape, num_workers), f"has not taken up {num_workers} workers of shape {shape!r}"
        )

    async def _ask(self, shape: str, num_workers: int) -> None:
        async with self._one_at_a_time:  # each is held against the budget that the one before left
            self._check_budget(await self._wanted(), shape, num_workers)
            board = await self._get_board()
            await board.ask.remote(shape, num_workers)
            while (await self._wanted())[shape] != num_workers:  # noqa: ASYNC110  Serve looks in by itself
                await asyncio.sleep(_POLL_S)

    async def _wanted(self) -> dict[str, int]:
        fixed = {name: s.min_workers for name, s in self._shapes.items() if name not in self._elastic}
        if not self._elastic:
            return fixed
        board = await self._get_board()
        while not self._elastic <= (known := await board.wanted.remote()).keys():  # noqa: ASYNC110  same
            await asyncio.sleep(_POLL_S)
        return fixed | {name: known[name] for name in self._elastic}

    async def _get_board(self) -> Any:
        if self._board is None:
            # Not detached: it ends with this process.
            options = {"name": self._board_name, "namespace": NAMESPACE, "get_if_exists": True, "num_cpus": 0}
            actor = ray.remote(CountBoard).options(**options)
            self._board = await asyncio.to_thread(actor.remote)
        return self._board

    async def _within_time(self, call: Any, complaint: str) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except TimeoutError as error:
            raise ScalingError(f"Ray Serve {complaint} within {self._timeout_s:g} s") from error
        except RayError as error:
            self._board = None  # the next call makes another one
            raise ScalingError(f"the board that tells Ray Serve the counts is gone: {error}") from error

    def _check_range(self, shape: str, num_workers: int) -> None:
        if shape not in self._shapes:
            raise ValueError(f"no shape {shape!r}; known: {', '.join(self._shapes)}")
        least, most = self._shapes[shape].min_workers, self._shapes[shape].max_workers
        if not least <= num_workers <= most:
            raise ValueError(f"shape {shape!r} may have {least} to {most} workers, not {num_workers}")

    def _check_budget(self, wanted: Mapping[str, int], shape: str, num_workers: int) -> None:
        if self._gpu_budget is None or num_workers <= wanted[shape]:
            return
        counts = {**wanted, shape: num_workers}
        num_gpus = sum(self._shapes[name].gpus_per_worker * count for name, count in counts.items())
        if num_gpus > self._gpu_budget:
            raise ValueError(
                f"{num_workers} workers of shape {shape!r} make {num_gpus:g} GPUs in all; "
                f"the budget is {self._gpu_budget:g}"
            )
