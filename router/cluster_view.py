"""The cluster as this router sees it: the last snapshot, live links, and what it has sent since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.types import Snapshot, WorkerLoad, WorkerReport
from router.policy import Candidate
from router.worker_link import OnLoad, WorkerLink

MakeLink = Callable[[WorkerReport, OnLoad], WorkerLink]


@dataclass(slots=True)
class _Sent:
    """What this router sent to a worker that its last known load does not show yet."""

    num_requests: int = 0
    prefill_tokens: int = 0
    kv_tokens: int = 0


class Member:
    """One worker start."""

    def __init__(self, report: WorkerReport, make_link: MakeLink) -> None:
        self.report = report
        self.listed = True
        """False once a snapshot came without it: offered nothing new, but what runs there goes on."""
        self.load = report.load
        self._sent = _Sent()
        self._heard = False
        self.link = make_link(report, self.on_load)

    def on_load(self, load: WorkerLoad) -> None:
        """The worker said its load itself, along with an answer."""
        self._heard = True
        self._set_load(load)

    def on_report(self, report: WorkerReport) -> None:
        """A snapshot's report; its load is older than what the worker has said since the one before."""
        self.report, self.listed = report, True
        if not self._heard:
            self._set_load(report.load)
        self._heard = False

    def _set_load(self, load: WorkerLoad) -> None:
        self.load = load
        self._sent = _Sent()

    def count(self, *, prefill_tokens: int = 0, kv_tokens: int = 0) -> None:
        """Notes a request that is being sent."""
        self._sent.num_requests += 1
        self._sent.prefill_tokens += prefill_tokens
        self._sent.kv_tokens += kv_tokens

    def candidate(self) -> Candidate:
        report, load, sent = self.report, self.load, self._sent
        return Candidate(
            worker_id=report.worker_id,
            revision=report.revision,
            role=report.role,
            num_requests=load.num_running + load.num_waiting + sent.num_requests,
            waiting_prefill_tokens=load.waiting_prefill_tokens + sent.prefill_tokens,
            kv_used_tokens=load.kv_used_blocks * report.block_size_tokens + sent.kv_tokens,
            kv_capacity_tokens=report.kv_capacity_tokens,
        )


class ClusterView:
    """Members by worker id; only :meth:`update` changes who they are."""

    def __init__(self, make_link: MakeLink) -> None:
        self._make_link = make_link
        self._members: dict[str, Member] = {}
        self.snapshot: Snapshot | None = None

    def update(self, snapshot: Snapshot) -> list[WorkerLink]:
        """Takes a snapshot unless it is older than the one at hand.

        Returns:
            Links to workers that are gone, for the caller to close.
        """
        known = self.snapshot
        if known and known.incarnation == snapshot.incarnation and known.epoch > snapshot.epoch:
            return []
        self.snapshot = snapshot
        reports = {report.worker_id: report for report in snapshot.workers}
        closed = []
        for worker_id, member in list(self._members.items()):
            report = reports.get(worker_id)
            if report is None:
                # A registry that has just started, or missed heartbeats, says nothing of the streams.
                member.listed = False
                restarted = False
            else:
                restarted = report.incarnation != member.report.incarnation
            if restarted or not (member.listed or (member.link.up and not member.link.idle)):
                closed.append(self._members.pop(worker_id).link)
        for worker_id, report in reports.items():
            if worker_id in self._members:
                self._members[worker_id].on_report(report)
            else:
                self._members[worker_id] = Member(report, self._make_link)
        return closed

    def member(self, worker_id: str) -> Member | None:
        return self._members.get(worker_id)

    def members(self) -> Sequence[Member]:
        return list(self._members.values())

    def candidates(self, model: str, revision: str | None = None) -> list[Candidate]:
        """Workers of ``model`` that can be sent a request now.

        Args:
            revision: only workers with these weights; None for any.
        """
        return [
            member.candidate()
            for member in self._members.values()
            if member.report.model == model
            and revision in (None, member.report.revision)
            and member.listed
            and member.report.role_assigned
            and not member.report.draining
            and member.link.up
        ]
