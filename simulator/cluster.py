"""The workers of one simulation: their start and end, their heartbeats, and what is done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
from simulator.desired_roles import DesiredRoles
from simulator.event_queue import EventQueue
from simulator.pulls import KvPulls
from simulator.recorder import Recorder
from simulator.registry_view import RegistryView
from simulator.result import ClusterEvent
from simulator.router import SimulatedRouter
from simulator.spec import ClusterSpec, WorkerGroup
from simulator.worker import CacheChanges, SimulatedWorker


@dataclass(frozen=True, slots=True)
class _Start:
    worker_id: str
    group: WorkerGroup
    role: Role | None
    """None: what is lacking then."""


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
        self.registry = RegistryView(spec.missed_heartbeats * spec.heartbeat_s)
        self.roles = DesiredRoles(spec.groups)
        self._routers = routers
        self._caches_shared = caches_shared
        """Whether routers want to know what workers' prefix caches hold."""
        self._groups = {group.shape: group for group in spec.groups}
        self._workers: dict[str, SimulatedWorker] = {}
        self._gone: list[SimulatedWorker] = []
        self._starting: dict[str, _Start] = {}
        self._asked: dict[str, int] = {}
        """Workers by shape that Serve is about to be at."""
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

    @property
    def num_starting(self) -> int:
        """Workers that hold GPUs and do not serve yet."""
        return len(self._starting)

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
        """Every worker reports; every router gets the snapshot."""
        for worker in list(self._workers.values()):
            if worker.draining and worker.model.drained:
                self.registry.leave(worker.worker_id)
                self._leave(worker)
            elif worker.changed or worker.reported_change:
                # A router that heard of a worker since the heartbeat before passes over one report.
                worker.changed, worker.reported_change = False, worker.changed
                self._report(worker)
            elif self.spec.planner is not None:
                self.registry.on_load(self.queue.now_s, worker.worker_id, worker.load())

    def _report(self, worker: SimulatedWorker) -> None:
        report = worker.report()
        self.registry.on_report(self.queue.now_s, report)
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

    def assign_role(self, worker_id: str, role: Role) -> None:
        """The registry gives a worker another role."""
        self._act(self.queue.now_s, SwitchRole(time_s=self.queue.now_s, worker_id=worker_id, role=role))

    def num_wanted(self, shape: str) -> int:
        """Workers of a shape that have been asked for: those that serve or start, without those that go."""
        if shape in self._asked:
            return self._asked[shape]
        return len(self._staying(shape)) + len(self._starts(shape))

    def ask(self, shape: str, num_workers: int) -> None:
        """Asks Serve for so many workers. It is not faster than the registry, so roles change first."""
        if shape in self._groups:
            self._asked[shape] = num_workers
            self.queue.at(self.queue.now_s + self.spec.role_switch_s, self._scale, self._groups[shape])
        else:
            self._note("ignored", shape, "no such shape")

    def _scale(self, now_s: float, group: WorkerGroup) -> None:
        """As Serve does: down from the newest on, those first that have not started."""
        shape = group.shape
        num_workers = self._asked.pop(shape, None)
        if num_workers is None:
            return  # done together with what was asked for before
        for _ in range(num_workers - self.num_wanted(shape)):
            self._start(self._next_id(group), group, None)
        for _ in range(self.num_wanted(shape) - num_workers):
            if starts := self._starts(shape):
                self._note("stop", starts[-1].worker_id, "before it had started")
                del self._starting[starts[-1].worker_id]
                self._take_gpus(-group.gpus_per_worker)
            else:
                newest = self._staying(shape)[-1]
                self._act(now_s, RemoveWorker(time_s=now_s, worker_id=newest.worker_id))

    def _staying(self, shape: str) -> list[SimulatedWorker]:
        """Oldest first."""
        return [w for w in self._workers.values() if w.group.shape == shape and not w.draining]

    def _starts(self, shape: str) -> list[_Start]:
        return [start for start in self._starting.values() if start.group.shape == shape]

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
            self.roles.assign(worker, action.role)
            self.queue.at(now_s + self.spec.role_switch_s, self._take_role, worker)
        else:
            self._note("ignored", worker.worker_id, f"may not take the role {action.role.value}")

    def _take_role(self, now_s: float, worker: SimulatedWorker) -> None:
        """The worker hears of its desired role, the last one if there were several."""
        role = self.roles.of(worker)
        if self._workers.get(worker.worker_id) is worker and role is not worker.role:
            self._note("role_switch", worker.worker_id, f"{worker.role.value} to {role.value}")
            self.num_role_switches += 1
            worker.set_role(role)
            self._report(worker)

    def _remove(self, now_s: float, worker: SimulatedWorker, action: RemoveWorker) -> None:
        self._note("stop", worker.worker_id)
        worker.set_draining()
        self._report(worker)

    def _kill(self, now_s: float, worker: SimulatedWorker, action: Kill) -> None:
        self._note("kill", worker.worker_id)
        role = self.roles.of(worker)
        self._leave(worker)
        worker.fail()
        if self.spec.restart and not worker.draining:
            self._start(worker.worker_id, worker.group, role)

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

    def _start(self, worker_id: str, group: WorkerGroup, role: Role | None) -> None:
        self._take_gpus(group.gpus_per_worker)
        start = self._starting[worker_id] = _Start(worker_id, group, role)
        self.queue.at(self.queue.now_s + group.startup_s, self._started, start)

    def _started(self, now_s: float, start: _Start) -> None:
        if self._starting.get(start.worker_id) is not start:
            return  # not wanted any more
        del self._starting[start.worker_id]
        role = start.role
        if role is None:
            of_shape = [worker for worker in self._workers.values() if worker.group is start.group]
            role = self.roles.lacking(start.group, of_shape)
        self._note("start", start.worker_id, role.value)
        self._join(start.worker_id, start.group, role)

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
        self.roles.forget(worker.worker_id)
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
