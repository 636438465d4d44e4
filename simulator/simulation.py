"""Runs a trace on a simulated cluster: the real routing policy, core's worker model, virtual time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from core.garbage import no_collection
from core.step_times import StepTimes
from planner.planner import Planner
from router.policy import LeastLoadPolicy
from router.routing import RoutingPolicy
from simulator.actions import Action
from simulator.cluster import SimulatedCluster
from simulator.event_queue import EventQueue
from simulator.gate import Gate
from simulator.planner_loop import MakePlanner, PlannerLoop
from simulator.recorder import Recorder
from simulator.relay import Lap
from simulator.result import SimulationResult
from simulator.router import SimulatedRouter
from simulator.spec import ClusterSpec
from simulator.timeline import TimelineRecorder
from simulator.traces.trace import Trace

_NUM_SAMPLES = 600
_MIN_SAMPLE_S = 0.1

MakePolicy = Callable[[int], RoutingPolicy]
"""Makes one router's policy from a seed."""


def simulate(
    trace: Trace,
    spec: ClusterSpec,
    *,
    make_policy: MakePolicy = LeastLoadPolicy,
    actions: Sequence[Action] = (),
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    make_planner: MakePlanner = Planner,
) -> SimulationResult:
    """Simulates until every request has ended.

    Args:
        trace: what arrives.
        spec: the cluster it arrives at.
        make_policy: the routing policy; each router has its own.
        actions: what else happens.
        seed: seeds the policies; the same seed gives the same result.
        on_progress: told now and then how many requests have ended, and of how many.
        make_planner: what decides, if the cluster has a planner.

    Raises:
        core.errors.ConfigError: an action names something that is not there.
    """
    return Simulation(trace, spec, make_policy, actions, seed, on_progress, make_planner).run()


class Simulation:
    """One run; see :func:`simulate` for its arguments."""

    def __init__(
        self,
        trace: Trace,
        spec: ClusterSpec,
        make_policy: MakePolicy,
        actions: Sequence[Action],
        seed: int,
        on_progress: Callable[[int, int], None] | None,
        make_planner: MakePlanner = Planner,
    ) -> None:
        self._trace = trace
        self._spec = spec
        self._on_progress = on_progress
        self.queue = EventQueue()
        self._recorder = Recorder(trace.requests)
        self.routers = [
            SimulatedRouter(
                make_policy(seed * spec.num_routers + n),
                self.queue,
                StepTimes(spec.assumed_step_time),
                None if spec.admission is None else Gate(spec.admission, self.queue, spec.admission_rest_s),
                spec.num_routers,
                f"router-{n}",
            )
            for n in range(spec.num_routers)
        ]
        self.cluster = SimulatedCluster(
            spec,
            self.queue,
            self._recorder,
            self.routers,
            caches_shared=any(request.block_hashes for request in trace.requests),
        )
        self.cluster.schedule(actions)
        self.planner = (
            None
            if spec.planner is None
            else PlannerLoop(spec, spec.planner, self.queue, self.cluster, self.routers, make_planner)
        )
        self._timeline = TimelineRecorder()
        self._sample_s = max(trace.duration_s / _NUM_SAMPLES, _MIN_SAMPLE_S)

    def run(self) -> SimulationResult:
        """Runs until every request has ended; once."""
        wall_start_s = time.perf_counter()
        self.start()
        with no_collection():  # a tenth of its time, and few cycles to find
            while self._recorder.num_open:
                self.queue.run_next()
            self.queue.run_until(self._recorder.last_end_s)
        return SimulationResult(
            trace_name=self._trace.name,
            requests=self._recorder.request_table(),
            gaps=self._recorder.gaps(),
            timeline=self._timeline.timeline(),
            events=tuple(self.cluster.events),
            num_role_switches=self.cluster.num_role_switches,
            gpu_seconds=self.cluster.gpu_seconds(),
            simulated_s=self.queue.now_s,
            wall_s=time.perf_counter() - wall_start_s,
            extrapolated_share=self.cluster.extrapolated_share(),
            num_preemptions=self._recorder.num_preemptions,
            num_recomputed=self._recorder.num_recomputed,
            decisions=() if self.planner is None else tuple(self.planner.decisions),
            planner_cpu_s=0.0 if self.planner is None else self.planner.cpu_s,
            planner_cpu_max_s=0.0 if self.planner is None else self.planner.cpu_max_s,
        )

    def start(self) -> None:
        """Schedules what makes everything else happen."""
        if self._trace.requests:
            self.queue.at(self._trace.requests[0].arrival_s, self._arrive, 0)
            self.queue.at(0.0, self._sample)
            self.queue.at(self._spec.heartbeat_s, self._heartbeat)
            if len(self.routers) > 1:  # a single one hears of all there is by the answers it gets
                self.queue.at(self._spec.load_beat_s, self._load_beat)
            if self.planner is not None:
                self.planner.start()

    def settle(self, duration_s: float) -> None:
        """Runs on after the last request has ended: leases end, workers come back, timers go off."""
        self.queue.run_until(self.queue.now_s + duration_s)

    def _arrive(self, now_s: float, index: int) -> None:
        requests = self._trace.requests
        if index + 1 < len(requests):
            self.queue.at(requests[index + 1].arrival_s, self._arrive, index + 1)
        router = self.routers[index % len(self.routers)]
        Lap(self.cluster, router, index, requests[index]).arrive(now_s)

    def _heartbeat(self, now_s: float) -> None:
        self.cluster.heartbeat()
        self.queue.at(now_s + self._spec.heartbeat_s, self._heartbeat)

    def _load_beat(self, now_s: float) -> None:
        self.cluster.load_beat()
        self.queue.at(now_s + self._spec.load_beat_s, self._load_beat)

    def _sample(self, now_s: float) -> None:
        self._timeline.sample(now_s, self.cluster)
        if self._on_progress is not None:
            num_all = len(self._trace.requests)
            self._on_progress(num_all - self._recorder.num_open, num_all)
        self.queue.at(now_s + self._sample_s, self._sample)
