"""The cluster as this router sees it: the last snapshot, live links, and what it has sent since."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.clock import Clock
from core.prompt_blocks import PromptBlocks
from core.step_times import StepTimes
from core.types import Snapshot, WorkerLoad, WorkerReport
from router.cache_feed import CacheFeed
from router.circuit_breaker import CircuitBreaker
from router.prefix_guess import PrefixKnowledge
from router.routing import Candidate
from router.worker_link import OnLoad, WorkerLink
from router.worker_view import WorkerView

MakeLink = Callable[[WorkerReport, OnLoad], WorkerLink]


class Member:
    """One worker start.

    Args:
        prefixes: told what the worker has cached, by its incarnation.
        on_news: called when the worker says how loaded it is.
    """

    def __init__(
        self,
        report: WorkerReport,
        make_link: MakeLink,
        clock: Clock,
        step_times: StepTimes,
        prefixes: PrefixKnowledge,
        on_news: Callable[[], None],
    ) -> None:
        self.view = WorkerView(report, clock, step_times)
        self.listed = True
        """False once a snapshot came without it: offered nothing new, but what runs there goes on."""
        self._on_news = on_news
        self.link = make_link(report, self._on_load)
        self.breaker = CircuitBreaker(clock)
        self._prefixes = prefixes
        prefixes.set_worker(report.incarnation, report.num_kv_blocks)
        self._feed = CacheFeed(self.link.channel, prefixes, report.incarnation, self.link.router_id)

    @property
    def report(self) -> WorkerReport:
        return self.view.report

    def on_report(self, report: WorkerReport) -> None:
        self.listed = True
        self.view.on_report(report)

    def _on_load(self, load: WorkerLoad) -> None:
        self.view.on_load(load)
        self._on_news()

    async def close(self) -> None:
        """Ends everything that runs over its link with WorkerLost."""
        await self._feed.close()
        self._prefixes.remove_worker(self.report.incarnation)
        await self.link.close()


def _nobody_listens() -> None:
    pass


class ClusterView:
    """Members by worker id; only :meth:`update` changes who they are.

    Args:
        step_times: how long steps take, by shape and role; None if nobody knows.
    """

    def __init__(self, make_link: MakeLink, clock: Clock, step_times: StepTimes | None = None) -> None:
        self._make_link = make_link
        self._clock = clock
        self._step_times = step_times or StepTimes()
        self._members: dict[str, Member] = {}
        self._prefixes = PrefixKnowledge()
        self.on_news: Callable[[], None] = _nobody_listens
        """Called when something was heard of the workers."""
        self.snapshot: Snapshot | None = None

    def update(self, snapshot: Snapshot) -> list[Member]:
        """Takes a snapshot unless it is older than the one at hand.

        Returns:
            Members that are gone, for the caller to close.
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
                closed.append(self._members.pop(worker_id))
        for worker_id, report in reports.items():
            if worker_id in self._members:
                self._members[worker_id].on_report(report)
            else:
                self._members[worker_id] = Member(
                    report,
                    self._make_link,
                    self._clock,
                    self._step_times,
                    self._prefixes,
                    lambda: self.on_news(),
                )
        for member in self._members.values():
            member.view.num_routers = snapshot.num_routers
        self.on_news()
        return closed

    def member(self, worker_id: str) -> Member | None:
        return self._members.get(worker_id)

    def members(self) -> Sequence[Member]:
        return list(self._members.values())

    def candidates(self, model: str, revision: str | None = None) -> list[Candidate]:
        """Workers of ``model`` that can be sent a request now.

        Those whose circuit breaker is open are left out, unless all of their role are.

        Args:
            revision: only workers with these weights; None for any.
        """
        usable = [
            member
            for member in self._members.values()
            if member.report.model == model
            and revision in (None, member.report.revision)
            and member.listed
            and member.report.role_assigned
            and not member.report.draining
            and member.link.up
        ]
        if any(member.breaker.is_open for member in usable):
            usable = _past_breakers(usable)
        return [member.view.candidate() for member in usable]

    def suspects(self) -> dict[str, int]:
        """How often each worker start's circuit breaker has opened, by incarnation; only those that did."""
        return {
            member.report.incarnation: member.breaker.num_opened
            for member in self._members.values()
            if member.breaker.num_opened
        }

    def cached_tokens(self, blocks: PromptBlocks) -> dict[str, int]:
        """How many leading tokens of a prompt each worker has cached, as far as this router can tell.

        Returns:
            By worker id, only those that have some.
        """
        by_start = {member.report.incarnation: member for member in self._members.values()}
        cached: dict[str, int] = {}
        for size in {member.report.block_size_tokens for member in self._members.values()}:
            matched = self._prefixes.match(blocks.states(size), self._clock.now_s())
            for incarnation, num_blocks in matched.items():
                member = by_start.get(incarnation)  # one that has just left is forgotten when it is closed
                report = None if member is None else member.report
                if report is not None and report.block_size_tokens == size:
                    cached[report.worker_id] = min(num_blocks * size, blocks.most_cached_tokens(size))
        return cached

    def prompt_sent(self, member: Member, blocks: PromptBlocks) -> None:
        """A worker will soon have a prompt's blocks cached."""
        report = member.report
        if self._members.get(report.worker_id) is member:
            states = blocks.states(report.block_size_tokens)
            self._prefixes.sent(report.incarnation, states, self._clock.now_s())


def _past_breakers(members: Sequence[Member]) -> list[Member]:
    closed = [member for member in members if not member.breaker.is_open]
    roles = {member.report.role for member in closed}
    return closed + [member for member in members if member.report.role not in roles]
