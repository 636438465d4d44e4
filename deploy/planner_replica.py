"""The planner in a Ray Serve replica: a process of its own, so that thinking never starves membership."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from core.clock import MonotonicClock
from core.step_times import StepTimes
from core.table_step_time import TableStepTime
from core.types import Role
from deploy.node import node_host
from deploy.planner_settings import PlannerReplicaSettings
from deploy.settings import COUNT_BOARD_NAME
from planner.instruments import Instruments
from planner.loop import PlannerLoop
from planner.observation import Observation
from planner.planner import Planner
from planner.ports import Scaler
from planner.serve_scaler import ServeScaler
from planner.settings import PlannerSettings
from telemetry.exporter import new_registry, start_exporter
from telemetry.logs import configure_logging, fields
from telemetry.planner_metrics import PlannerMetrics

logger = logging.getLogger(__name__)


class PlannerReplica:
    """Deployed once a model, if its mode is not off.

    Args:
        registry: handle of the registry deployment.
    """

    async def __init__(self, settings: PlannerReplicaSettings, registry: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logging("planner")
        clock = MonotonicClock()
        step_times = StepTimes({shape: TableStepTime(p) for shape, p in settings.profiles.items()}.get)
        metrics_registry = new_registry()
        metrics = PlannerMetrics(metrics_registry, model=settings.model, mode=settings.mode)
        self._exporter = start_exporter(node_host(settings.bind_host), metrics_registry)
        self._settings = settings
        self._started_at_s = time.time()
        self._instruments = Instruments(metrics, settings.planner, step_times, clock)
        self._loop = PlannerLoop(
            Planner(settings.planner, step_times, clock),
            _Registry(registry, self._exporter.address),
            _scaler(settings.planner),
            self._instruments,
            clock,
            mode=settings.mode,
            interval_s=settings.planner.interval_s,
        )
        self._task = asyncio.create_task(self._loop.run(), name="planner loop")
        logger.info("planner ready", extra=fields(mode=settings.mode.value, metrics=self._exporter.address))

    async def report(self, last: int, number: int | None = None, moves: bool = False) -> dict[str, Any]:
        """How it does, and decisions as plain data, the newest last.

        Args:
            last: how many.
            number: only the one with this number, if it is remembered.
            moves: only those that change something.
        """
        history = self._loop.history
        if number is None:
            decisions = history.last(last, moves=moves)
        else:
            found = history.numbered(number)
            decisions = [] if found is None else [found]
        return {
            "model": self._settings.model,
            "mode": self._settings.mode.value,
            "interval_s": self._settings.planner.interval_s,
            "started_at_s": self._started_at_s,
            "observation_age_s": self._instruments.observation_age_s,
            "trouble": self._loop.trouble,
            "step_time_factors": self._instruments.factors(),
            "decisions": [past.as_dict() for past in decisions],
        }

    async def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            RuntimeError: the loop has ended; the replica has to be replaced.
        """
        if self._task.done():
            raise RuntimeError("the planner's loop ended")

    async def __del__(self) -> None:
        """Ray Serve's shutdown hook."""
        if not hasattr(self, "_task"):
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._exporter.stop()


def _scaler(settings: PlannerSettings) -> Scaler | None:
    """None where every shape has a fixed number of workers."""
    if all(shape.min_workers == shape.max_workers for shape in settings.shapes):
        return None
    return ServeScaler(settings.shapes, board=COUNT_BOARD_NAME, gpu_budget=settings.gpu_budget)


class _Registry:
    """The registry deployment as the loop knows it."""

    def __init__(self, handle: Any, metrics_address: str) -> None:
        self._handle = handle
        self._metrics_address = metrics_address

    async def observe(self) -> Observation:
        observation: Observation = await self._handle.observe.remote(self._metrics_address)
        return observation

    async def assign_role(self, worker_id: str, role: Role) -> None:
        await self._handle.assign_role.remote(worker_id, role)
