"""The planner in a simulated cluster: looks at it as often as the live one, sees no more, does as much."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from core.clock import Clock
from core.step_times import StepTimes
from planner.decision import PlanDecision
from planner.observation import Observation, ObservedRouter
from planner.planner import Planner
from planner.ports import DecidesSplits
from planner.settings import PlannerSettings
from simulator.cluster import SimulatedCluster
from simulator.event_queue import EventQueue
from simulator.router import SimulatedRouter
from simulator.spec import ClusterSpec

MakePlanner = Callable[[PlannerSettings, StepTimes, Clock], DecidesSplits]


class PlannerLoop:
    """Shows the planner what the registry knows, and does as it decides."""

    def __init__(
        self,
        spec: ClusterSpec,
        settings: PlannerSettings,
        queue: EventQueue,
        cluster: SimulatedCluster,
        routers: Sequence[SimulatedRouter],
        make_planner: MakePlanner = Planner,
    ) -> None:
        self.decisions: list[PlanDecision] = []
        self.cpu_s = 0.0
        self.cpu_max_s = 0.0
        """Of one look."""
        self._settings = settings
        self._heartbeat_s = spec.heartbeat_s
        self._queue = queue
        self._cluster = cluster
        self._routers = routers
        self._planner = make_planner(settings, StepTimes(spec.assumed_step_time), self)

    def now_s(self) -> float:
        """The virtual clock, for the planner."""
        return self._queue.now_s

    def start(self) -> None:
        """Routers speak in turn, and the planner looks between two heartbeats: news have different ages."""
        for number, router in enumerate(self._routers):
            self._queue.at(number * self._heartbeat_s / len(self._routers), self._say, router)
        self._queue.at(self._heartbeat_s / 2, self._look)

    def _say(self, now_s: float, router: SimulatedRouter) -> None:
        router.traffic.say(now_s, router.gate)
        self._queue.at(now_s + self._heartbeat_s, self._say, router)

    def _look(self, now_s: float) -> None:
        observation = self._observe(now_s)
        started_s = time.process_time()
        decision = self._planner.step(observation)
        cpu_s = time.process_time() - started_s
        self.cpu_s += cpu_s
        self.cpu_max_s = max(self.cpu_max_s, cpu_s)
        self.decisions.append(decision)
        for change in decision.role_changes:
            self._cluster.assign_role(change.worker_id, change.role)
        for shape, num_workers in decision.counts.items():
            self._cluster.ask(shape, num_workers)
        self._queue.at(now_s + self._settings.interval_s, self._look)

    def _observe(self, now_s: float) -> Observation:
        cluster = self._cluster
        return Observation(
            workers=cluster.registry.observed(now_s, cluster.roles.by_worker),
            routers=tuple(
                ObservedRouter(traffic=traffic.said, age_s=now_s - traffic.said_at_s)
                for traffic in (router.traffic for router in self._routers)
                if traffic.said is not None
            ),
            wanted={group.shape: cluster.num_wanted(group.shape) for group in cluster.spec.groups},
        )
