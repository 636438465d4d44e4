"""The registry: heartbeats in, desired states and snapshots out.

Level-triggered and without memory beyond the heartbeats: a restarted registry waits until every
worker has had time to report, adopts the roles they report, and only then publishes. A worker that
stops reporting drops out. A worker that was never given a role gets the one its shape's split lacks
most: the initial split, as changed by the moves since. One that joins while nobody is missing is a spare,
as when a node is drained and those to replace its workers start first: the first role that falls vacant is
its own.

A role switch is a desired role that differs from the reported one. Every answer to a heartbeat says it
again until a report agrees, so a lost answer, a worker's restart or a second move need nothing more.

A worker in quarantine stays a member that drains, whatever it reports, until it has gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from core.clock import Clock
from core.traffic import TrafficSummary
from core.types import DesiredState, KvPeer, Role, Snapshot, SuspectNode, WorkerReport
from planner.observation import Observation, ObservedRouter, ObservedWorker
from planner.quarantine import Quarantine

_REBUILD_HEARTBEATS = 2
_ROUTER_TTL_S = 60.0
"""A router that has said nothing for so long is forgotten."""
_ABSENT_S = 3.0
"""Routers ask twice a second: a registry that nobody has asked for so long did not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryConfig:
    heartbeat_s: float
    """How often workers report."""
    missed_heartbeats: int
    """A worker silent for this many heartbeats is gone."""
    initial_split: Mapping[str, Mapping[Role, int]] = field(default_factory=dict)
    """Shape to number of workers per role."""


@dataclass(slots=True)
class _Member:
    """Times are those in which the registry ran."""

    report: WorkerReport
    heard_at_s: float
    desired_role: Role
    joined_at_s: float
    quarantined: str = ""
    """Why, if it is."""
    spare: bool = False
    """Nobody was missing when it joined, and nobody has given it a role since."""

    @property
    def shown(self) -> WorkerReport:
        """Its report as others get it."""
        if not self.quarantined:
            return self.report
        return replace(self.report, draining=True, trouble=self.quarantined)


@dataclass(frozen=True, slots=True)
class _Router:
    """As a :class:`_Member`'s, its time is the one in which the registry ran."""

    traffic: TrafficSummary
    heard_at_s: float


class Registry:
    """Membership of one cluster, and what its routers have last said of their traffic.

    Args:
        incarnation: unique for each start of the registry.
    """

    def __init__(self, config: RegistryConfig, clock: Clock, incarnation: str) -> None:
        self._config = config
        self._clock = clock
        self._incarnation = incarnation
        self._looked_at_s = clock.now_s()
        self._present_s = 0.0
        """Time since the start in which the registry ran and could have heard a worker."""
        self._members: dict[str, _Member] = {}
        self._routers: dict[str, _Router] = {}
        self._split = {shape: dict(roles) for shape, roles in config.initial_split.items()}
        self._epoch = 0
        self._membership: tuple[object, ...] = ()
        self._quarantine = Quarantine(clock)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def rebuilding(self) -> bool:
        """True while a worker that served before this start may not have reported yet."""
        return self._look() < _REBUILD_HEARTBEATS * self._config.heartbeat_s

    def members(self) -> dict[str, WorkerReport]:
        """The latest report of each worker, also while rebuilding."""
        return {worker_id: member.shown for worker_id, member in self._members.items()}

    @property
    def suspect_nodes(self) -> tuple[SuspectNode, ...]:
        return self._quarantine.suspect_nodes()

    def heartbeat(self, report: WorkerReport) -> DesiredState:
        """Takes a worker's report, says what it should do."""
        now_s, member = self._look(), self._members.get(report.worker_id)
        if member is None:
            missing, num_missing = self._missing_role(report)
            self._members[report.worker_id] = _Member(
                report,
                heard_at_s=now_s,
                desired_role=report.role if report.role_assigned else missing,
                joined_at_s=now_s,
                spare=not report.role_assigned and num_missing <= 0,
            )
        else:
            member.heard_at_s = now_s
            overtaken = (
                member.report.incarnation == report.incarnation and member.report.heartbeat > report.heartbeat
            )
            if not overtaken:
                member.report = report
            if member.desired_role not in report.allowed_roles:
                member.desired_role, _ = self._missing_role(report)
        self._refresh()
        return self.desired_state(report)

    def desired_state(self, report: WorkerReport) -> DesiredState:
        """What a worker should do, as of now; what it does already if it is not known any more."""
        member = self._members.get(report.worker_id)
        if member is None:
            return DesiredState(role=report.role, peers=self._peers_of(report))
        return DesiredState(
            role=member.desired_role,
            draining=bool(member.quarantined),
            quarantined=member.quarantined,
            peers=self._peers_of(report),
        )

    def is_to_change(self, report: WorkerReport) -> bool:
        """Whether a worker that reports this should do something else."""
        member = self._members.get(report.worker_id)
        if member is None:
            return False
        in_role = report.role_assigned and report.role is member.desired_role
        return not in_role or bool(member.quarantined and not report.trouble)

    def router_heard(self, traffic: TrafficSummary) -> None:
        """Takes a router's summary."""
        self._routers[traffic.router_id] = _Router(traffic, self._look())
        self._quarantine.router_heard(traffic.router_id, traffic.suspects)
        self._refresh()

    def observe(self) -> Observation:
        """Everything the planner goes by, also while rebuilding."""
        self._refresh()
        now_s = self._look()
        return Observation(
            workers=tuple(
                ObservedWorker(
                    report=member.shown,
                    desired_role=member.desired_role,
                    age_s=now_s - member.heard_at_s,
                )
                for member in self._members.values()
            ),
            routers=tuple(
                ObservedRouter(traffic=router.traffic, age_s=now_s - router.heard_at_s)
                for router in self._routers.values()
            ),
            rebuilding=self.rebuilding,
        )

    def leave(self, worker_id: str, incarnation: str, died_of: str = "") -> float:
        """Forgets a worker that is going, unless a newer start has taken its place.

        Args:
            died_of: why it cannot stay; empty if it was told to go.

        Returns:
            How long the next one should wait before it starts there, in seconds.
        """
        member = self._members.get(worker_id)
        if member is not None and member.report.incarnation == incarnation:
            del self._members[worker_id]
            if died_of:
                self._note_death(member, died_of)
            self._refresh()
            return self._quarantine.start_delay_s(member.report.shape, member.report.node_id)
        return 0.0

    def start_failed(self, shape: str, node_id: str, reason: str) -> float:
        """A worker could not start.

        Returns:
            As :meth:`leave` does.
        """
        self._quarantine.died(shape, node_id, reason, 0.0)
        return self._quarantine.start_delay_s(shape, node_id)

    def _note_death(self, member: _Member, reason: str) -> None:
        report = member.report
        lived_s = member.heard_at_s - member.joined_at_s
        self._quarantine.died(report.shape, report.node_id, member.quarantined or reason, lived_s)

    def assign_role(self, worker_id: str, role: Role) -> None:
        """Makes ``role`` the worker's desired role, which every heartbeat's answer tells it.

        A worker that starts in its place later is meant for the same role.

        Raises:
            ValueError: no such worker, or its shape may not take the role.
        """
        member = self._members.get(worker_id)
        if member is None:
            raise ValueError(f"no worker {worker_id!r} in the cluster")
        if role not in member.report.allowed_roles:
            raise ValueError(f"shape {member.report.shape!r} may not take the role {role.value!r}")
        member.spare = False
        if role is not member.desired_role:
            split = self._split.setdefault(member.report.shape, {})
            split[member.desired_role] = max(0, split.get(member.desired_role, 0) - 1)
            split[role] = split.get(role, 0) + 1
            member.desired_role = role

    def use_split(self, split: Mapping[str, Mapping[Role, int]]) -> None:
        """Goes by another initial split. Workers that have a role keep it."""
        self._split = {shape: dict(roles) for shape, roles in split.items()}

    def snapshot(self) -> Snapshot | None:
        """The cluster now, or None while rebuilding after a start."""
        if self.rebuilding:
            return None
        self._refresh()
        return Snapshot(
            incarnation=self._incarnation,
            epoch=self._epoch,
            workers=tuple(member.shown for member in self._members.values()),
            suspect_nodes=self.suspect_nodes,
        )

    def _look(self) -> float:
        """Seconds since the start in which the registry ran, now.

        Somebody calls once a heartbeat, so what a gap has beyond that was the registry's own absence, and a
        long one was nothing else: it has not heard anyone, though heartbeats wait to be read.
        """
        now_s = self._clock.now_s()
        gap_s, self._looked_at_s = now_s - self._looked_at_s, now_s
        heartbeat_s = self._config.heartbeat_s
        if gap_s < max(_ABSENT_S, 2 * heartbeat_s):
            self._present_s += min(gap_s, heartbeat_s)
        return self._present_s

    def _refresh(self) -> None:
        """Drops who is silent, reviews the quarantine; a changed membership is a new epoch."""
        now_s = self._look()
        for router_id in [key for key, r in self._routers.items() if now_s - r.heard_at_s > _ROUTER_TTL_S]:
            del self._routers[router_id]
            self._quarantine.router_left(router_id)
        oldest_s = now_s - self._config.missed_heartbeats * self._config.heartbeat_s
        for worker_id in [key for key, m in self._members.items() if m.heard_at_s < oldest_s]:
            member = self._members.pop(worker_id)
            if member.report.trouble or not member.report.draining:  # who drains may just have finished
                self._note_death(member, "it fell silent")
        reasons = self._quarantine.review(member.report for member in self._members.values())
        for member in self._members.values():
            member.quarantined = reasons.get(member.report.incarnation, "")
        membership = tuple(
            (r.worker_id, r.incarnation, r.role, r.role_assigned, r.draining, r.trouble, r.address)
            for r in (member.shown for member in self._members.values())
        )
        if membership != self._membership:
            self._membership = membership
            self._epoch += 1
            if not self.rebuilding:
                self._fill_vacancies()

    def _fill_vacancies(self) -> None:
        for member in self._members.values():
            if member.spare and not member.shown.draining:
                role, num_missing = self._missing_role(member.report)
                if num_missing > 0:
                    member.desired_role, member.spare = role, False

    def _missing_role(self, report: WorkerReport) -> tuple[Role, int]:
        """The role that its shape lacks most beside this worker, and how many it lacks; 0 or less: none."""
        wanted = self._split.get(report.shape, {})
        taken = [
            member.desired_role
            for worker_id, member in self._members.items()
            if member.report.shape == report.shape
            and worker_id != report.worker_id
            and not member.shown.draining
        ]
        lacking = {role: wanted.get(role, 0) - taken.count(role) for role in report.allowed_roles}
        if Role.DECODE not in taken and lacking.get(Role.DECODE, 0) > 0:
            # Without one nobody is served, and the planner would make one of the others.
            return Role.DECODE, lacking[Role.DECODE]
        role = max(sorted(lacking), key=lambda role: lacking[role])
        return role, lacking[role]

    def _peers_of(self, report: WorkerReport) -> tuple[KvPeer, ...]:
        return tuple(
            KvPeer(incarnation=peer.incarnation, address=peer.address)
            for peer in (member.report for member in self._members.values())
            if peer.worker_id != report.worker_id
            and (peer.model, peer.revision) == (report.model, report.revision)
        )
