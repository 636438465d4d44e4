"""The workers of one simulation: their start and end, their heartbeats, and what is done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from core.errors import ConfigError
from core.types import Role, WorkerLoad
from simulator.actions import (
    Action,
    AddWorker,
    FailPulls,
    Kill,
    RemoveWorker,
    SlowLink,
    Stall,
    SwitchRole,
)
from simulator.event_queue import EventQueue
from simulator.pulls import KvPulls
from simulator.recorder import Recorder
from simulator.result import ClusterEvent
from simulator.router import SimulatedRouter
from simulator.spec import ClusterSpec, WorkerGroup
from simulator.worker import CacheChanges, SimulatedWorker


class SimulatedCluster:
    """Workers by id. Ids are shape and number: ``default-0``; those that prefill first come first."""

    def __init__(
        self,
        spec: ClusterSpec,
        queue: EventQueue,
        recorder: Recorder,
        routers: Sequence[SimulatedRouter],
        *,
        caches_shared: bool,
    ) -> None:
        self.spec = spec
        self.queue = queue
        self.recorder = recorder
        self.pulls = KvPulls(queue, recorder, spec.handoff_s)
        self.events: list[ClusterEvent] = []
        self.num_role_switches = 0
        self.num_starting = 0
        self._routers = routers
        self._caches_shared = caches_shared
        """Whether routers want to know what workers' prefix caches hold."""
        self._groups = {group.shape: group for group in spec.groups}
        self._workers: dict[str, SimulatedWorker] = {}
        self._gone: list[SimulatedWorker] = []
        self._desired: dict[str, Role] = {}
        self._beaten: dict[str, WorkerLoad] = {}
        self._num_made = dict.fromkeys(self._groups, 0)
        self._num_starts = 0
        self._gpus_held = 0.0
        self._gpu_seconds = 0.0
        self._gpus_counted_s = 0.0
        for group in spec.groups:
            for role in (Role.PREFILL, Role.DECODE):
                for _ in range(group.num_workers.get(role, 0)):
                    self._take_gpus(group.gpus_per_worker)
                    self._join(self._next_id(group), group, role)
        self.heartbeat()

    # ------------------------------------------------------------------------------------- views

    def worker(self, worker_id: str) -> SimulatedWorker | None:
        """The worker, if it lives."""
        return self._workers.get(worker_id)

    def workers(self) -> Iterator[SimulatedWorker]:
        """Those that live."""
        return iter(self._workers.values())

    def gpu_seconds(self) -> float:
        """GPUs held up to now, by workers that serve or start."""
        self._take_gpus(0.0)
        return self._gpu_seconds

    def extrapolated_share(self) -> float:
        """Share of the computing time that no measured point covers."""
        meters = [worker.step_time for worker in (*self._workers.values(), *self._gone)]
        computed_s = sum(meter.computed_s for meter in meters)
        return sum(meter.extrapolated_s for meter in meters) / computed_s if computed_s else 0.0

    # -------------------------------------------------------------------------------- heartbeats

    def heartbeat(self) -> None:
        """Every worker reports and does as it is told; every router gets the snapshot."""
        for worker in list(self._workers.values()):
            if (role := self._desired.get(worker.worker_id, worker.role)) is not worker.role:
                self._note("role_switch", worker.worker_id, f"{worker.role.value} to {role.value}")
                self.num_role_switches += 1
                worker.set_role(role)
            if worker.draining and worker.model.drained:
                self._leave(worker)
            elif worker.changed or worker.reported_change:
                # A router that heard of a worker since the heartbeat before passes over one report.
                worker.changed, worker.reported_change = False, worker.changed
                report = worker.report()
                for router in self._routers:
                    router.on_report(report)

    def load_beat(self) -> None:
        """Routers hear of loads that have changed without an answer to them."""
        for worker in self._workers.values():
            load = worker.load()
            if load != self._beaten.get(worker.worker_id):
                self._beaten[worker.worker_id] = load
                for router in self._routers:
                    router.on_load(worker.worker_id, load)

    # ----------------------------------------------------------------------------------- actions

    def schedule(self, actions: Sequence[Action]) -> None:
        """
        Raises:
            ConfigError: an action names a shape that is not there, or a role it may not take.
        """
        for action in actions:
            if isinstance(action, AddWorker):
                if action.shape not in self._groups:
                    raise ConfigError(f"no shape {action.shape!r}; there is {', '.join(self._groups)}")
                if action.role not in self._groups[action.shape].allowed_roles:
                    raise ConfigError(f"shape {action.shape!r} may not take the role {action.role.value!r}")
            self.queue.at(action.time_s, self._act, action)

    def _act(self, now_s: float, action: Action) -> None:
        if isinstance(action, AddWorker):
            group = self._groups[action.shape]
            self._start(self._next_id(group), group, action.role)
            return
        worker = self._workers.get(action.worker_id)
        if worker is None:
            self._note("ignored", action.worker_id, f"{type(action).__name__}: no such worker lives")
            return
        do: Callable[..., None] = _HANDLERS[type(action)]
        do(self, now_s, worker, action)

    def _switch_role(self, now_s: float, worker: SimulatedWorker, action: SwitchRole) -> None:
        if action.role in worker.group.allowed_roles:
            self._desired[worker.worker_id] = action.role
        else:
            self._note("ignored", worker.worker_id, f"may not take the role {action.role.value}")

    def _remove(self, now_s: float, worker: SimulatedWorker, action: RemoveWorker) -> None:
        self._note("stop", worker.worker_id)
        worker.set_draining()

    def _kill(self, now_s: float, worker: SimulatedWorker, action: Kill) -> None:
        self._note("kill", worker.worker_id)
        self._leave(worker)
        worker.fail()
        if self.spec.restart and not worker.draining:
            self._start(worker.worker_id, worker.group, worker.role)

    def _stall(self, now_s: float, worker: SimulatedWorker, action: Stall) -> None:
        self._note("stall", worker.worker_id, f"{action.duration_s:g} s")
        worker.stall(action.duration_s)
        silent_s = worker.stalled_since_s + self.spec.stall_timeout_s
        if worker.stalled_until_s > silent_s:
            self.queue.at(silent_s, self._silent, worker)

    def _silent(self, now_s: float, worker: SimulatedWorker) -> None:
        for leg in list(worker.legs.values()):
            leg.on_silent(now_s, worker)

    def _fail_pulls(self, now_s: float, worker: SimulatedWorker, action: FailPulls) -> None:
        self._note("fail_pulls", worker.worker_id, f"{action.duration_s:g} s")
        worker.failing_pulls_until_s = max(worker.failing_pulls_until_s, now_s + action.duration_s)

    def _slow_link(self, now_s: float, worker: SimulatedWorker, action: SlowLink) -> None:
        self._note("slow_link", worker.worker_id, f"{action.factor:g} x for {action.duration_s:g} s")
        worker.link.slowdown = action.factor
        worker.slow_link_until_s = max(worker.slow_link_until_s, now_s + action.duration_s)
        self.queue.at(now_s + action.duration_s, self._restore_link, worker)

    def _restore_link(self, now_s: float, worker: SimulatedWorker) -> None:
        if now_s >= worker.slow_link_until_s:
            worker.link.slowdown = 1.0

    # ------------------------------------------------------------------------------ start and end

    def _next_id(self, group: WorkerGroup) -> str:
        number = self._num_made[group.shape]
        self._num_made[group.shape] += 1
        return f"{group.shape}-{number}"

    def _start(self, worker_id: str, group: WorkerGroup, role: Role) -> None:
        self._take_gpus(group.gpus_per_worker)
        self.num_starting += 1
        self.queue.at(self.queue.now_s + group.startup_s, self._started, worker_id, group, role)

    def _started(self, now_s: float, worker_id: str, group: WorkerGroup, role: Role) -> None:
        self.num_starting -= 1
        self._note("start", worker_id, role.value)
        self._join(worker_id, group, role)

    def _join(self, worker_id: str, group: WorkerGroup, role: Role) -> None:
        self._num_starts += 1
        worker = SimulatedWorker(worker_id, str(self._num_starts), group, role, self.queue, self.recorder)
        self._workers[worker_id] = worker
        if self._caches_shared:
            worker.model.note_cache_changes()
            worker.on_cache_changes = self._on_cache_changes

    def _on_cache_changes(self, worker: SimulatedWorker, changes: CacheChanges) -> None:
        self.queue.at(self.queue.now_s + self.spec.cache_feed_s, self._feed, worker, changes)

    def _feed(self, now_s: float, worker: SimulatedWorker, changes: CacheChanges) -> None:
        """What a worker's cache holds reaches the routers, unless it died meanwhile."""
        if self._workers.get(worker.worker_id) is worker:
            for router in self._routers:
                router.on_cache_changes(worker.worker_id, changes)

    def _leave(self, worker: SimulatedWorker) -> None:
        del self._workers[worker.worker_id]
        self._gone.append(worker)
        self._desired.pop(worker.worker_id, None)
        self._take_gpus(-worker.group.gpus_per_worker)
        for router in self._routers:
            router.forget(worker.worker_id)

    def _take_gpus(self, num_gpus: float) -> None:
        self._gpu_seconds += self._gpus_held * (self.queue.now_s - self._gpus_counted_s)
        self._gpus_counted_s = self.queue.now_s
        self._gpus_held += num_gpus

    def _note(self, kind: str, worker_id: str, detail: str = "") -> None:
        self.events.append(
            ClusterEvent(time_s=self.queue.now_s, kind=kind, worker_id=worker_id, detail=detail)
        )


_HANDLERS: dict[type, Callable[..., None]] = {
    SwitchRole: SimulatedCluster._switch_role,
    RemoveWorker: SimulatedCluster._remove,
    Kill: SimulatedCluster._kill,
    Stall: SimulatedCluster._stall,
    FailPulls: SimulatedCluster._fail_pulls,
    SlowLink: SimulatedCluster._slow_link,
}
