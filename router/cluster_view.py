"""The cluster as this router sees it: the last snapshot, live links, and what it has sent since."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.clock import Clock
from core.types import Snapshot, WorkerReport
from router.routing import Candidate
from router.step_times import StepTimes
from router.worker_link import OnLoad, WorkerLink
from router.worker_view import WorkerView

MakeLink = Callable[[WorkerReport, OnLoad], WorkerLink]


class Member:
    """One worker start."""

    def __init__(
        self, report: WorkerReport, make_link: MakeLink, clock: Clock, step_times: StepTimes
    ) -> None:
        self.view = WorkerView(report, clock, step_times)
        self.listed = True
        """False once a snapshot came without it: offered nothing new, but what runs there goes on."""
        self.link = make_link(report, self.view.on_load)

    @property
    def report(self) -> WorkerReport:
        return self.view.report

    def on_report(self, report: WorkerReport) -> None:
        self.listed = True
        self.view.on_report(report)


class ClusterView:
    """Members by worker id; only :meth:`update` changes who they are."""

    def __init__(self, make_link: MakeLink, clock: Clock, step_times: StepTimes | None = None) -> None:
        self._make_link = make_link
        self._clock = clock
        self._step_times = step_times or StepTimes()
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
                self._members[worker_id] = Member(report, self._make_link, self._clock, self._step_times)
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
            member.view.candidate()
            for member in self._members.values()
            if member.report.model == model
            and revision in (None, member.report.revision)
            and member.listed
            and member.report.role_assigned
            and not member.report.draining
            and member.link.up
        ]
