"""The registry: membership, roles, epochs, what a restart may publish, and what the planner sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from core.clock import ManualClock
from core.traffic import TrafficSummary
from core.types import Role, WorkerLoad, WorkerReport
from planner.quarantine import OPENINGS
from planner.registry import Registry, RegistryConfig

CONFIG = RegistryConfig(
    heartbeat_s=1.0, missed_heartbeats=3, initial_split={"s": {Role.PREFILL: 1, Role.DECODE: 2}}
)


def report(worker_id: str, **changes: object) -> WorkerReport:
    base = WorkerReport(
        worker_id=worker_id,
        incarnation=f"{worker_id}-1",
        model="m",
        revision="",
        shape="s",
        allowed_roles=frozenset(Role),
        role=Role.DECODE,
        role_assigned=False,
        draining=False,
        address=f"127.0.0.1:{worker_id}",
        node_id="n",
        metrics_address="",
        block_size_tokens=16,
        num_kv_blocks=100,
        bytes_per_block=1024,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )
    return replace(base, **changes)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def registry(clock: ManualClock) -> Registry:
    made = Registry(CONFIG, clock, "r1")
    pass_s(made, clock, 2.0)
    return made


def join(registry: Registry, worker_id: str) -> Role:
    """Heartbeats of a new worker until it has the role it was told."""
    role = registry.heartbeat(report(worker_id)).role
    registry.heartbeat(report(worker_id, role=role, role_assigned=True))
    return role


def pass_s(
    registry: Registry, clock: ManualClock, seconds: float, alive: Mapping[str, Role] | None = None
) -> None:
    """Time in which the registry runs, and these workers report."""
    for _ in range(round(seconds / 0.5)):
        clock.advance(0.5)
        registry.observe()
        for worker_id, role in (alive or {}).items():
            registry.heartbeat(report(worker_id, role=role, role_assigned=True))


def test_new_workers_fill_the_initial_split(registry: Registry) -> None:
    roles = [join(registry, str(n)) for n in range(3)]
    assert sorted(roles) == [Role.DECODE, Role.DECODE, Role.PREFILL]


def test_the_first_worker_decodes_if_any_is_to(registry: Registry) -> None:
    registry.use_split({"s": {Role.PREFILL: 3, Role.DECODE: 1}})
    assert [join(registry, str(n)) for n in range(4)] == [Role.DECODE, *[Role.PREFILL] * 3]


def test_another_split_is_for_those_who_come(registry: Registry) -> None:
    for n in range(3):
        join(registry, str(n))
    registry.use_split({"s": {Role.PREFILL: 2, Role.DECODE: 2}})
    assert join(registry, "3") is Role.PREFILL
    assert (
        sorted(report.role for report in registry.members().values())
        == [Role.DECODE] * 2 + [Role.PREFILL] * 2
    )


def test_a_replacement_takes_the_role_of_the_one_that_died(registry: Registry, clock: ManualClock) -> None:
    roles = {str(n): join(registry, str(n)) for n in range(3)}
    dead = next(worker for worker, role in roles.items() if role is Role.PREFILL)
    del roles[dead]
    pass_s(registry, clock, 3.5, roles)
    assert join(registry, "9") is Role.PREFILL


def told(registry: Registry, worker_id: str, role: Role) -> Role:
    """The role that a worker in ``role`` is told by its next heartbeat."""
    return registry.heartbeat(report(worker_id, role=role, role_assigned=True)).role


class TestReplacementsThatComeFirst:
    """As Ray Serve starts them when a node is drained."""

    @pytest.fixture
    def prefill(self, registry: Registry) -> str:
        """It is to go; two replacements found nobody missing, and a decode worker has gone between them."""
        olds = {name: join(registry, name) for name in ("old0", "old1", "old2")}
        join(registry, "new0")
        gone = next(name for name, role in olds.items() if role is Role.DECODE)
        registry.leave(gone, f"{gone}-1")
        join(registry, "new1")
        assert self.in_role(registry, Role.DECODE) >= {"new0", "new1"}
        return next(name for name, role in olds.items() if role is Role.PREFILL)

    @staticmethod
    def in_role(registry: Registry, role: Role) -> set[str]:
        """Workers that are to have the role."""
        return {name for name, (_, desired) in roles_of(registry).items() if desired is role}

    def test_one_takes_the_role_of_the_worker_that_leaves(self, registry: Registry, prefill: str) -> None:
        registry.leave(prefill, f"{prefill}-1")
        assert self.in_role(registry, Role.PREFILL) < {"new0", "new1"}
        assert len(self.in_role(registry, Role.DECODE)) == 2

    def test_it_does_so_as_soon_as_that_one_drains(self, registry: Registry, prefill: str) -> None:
        registry.heartbeat(report(prefill, role=Role.PREFILL, role_assigned=True, draining=True))
        (successor,) = self.in_role(registry, Role.PREFILL) - {prefill}
        answer = registry.heartbeat(report(successor, role=Role.DECODE, role_assigned=True))
        assert answer.role is Role.PREFILL

    def test_those_that_were_given_a_role_keep_it(self, registry: Registry, prefill: str) -> None:
        for name in ("new0", "new1"):
            registry.assign_role(name, Role.DECODE)
        registry.leave(prefill, f"{prefill}-1")
        assert self.in_role(registry, Role.PREFILL) == set()

    def test_nobody_moves_while_nothing_is_vacant(self, registry: Registry, prefill: str) -> None:
        registry.leave("new1", "new1-1")
        assert self.in_role(registry, Role.PREFILL) == {prefill}


def test_a_worker_is_only_given_roles_it_may_take(registry: Registry) -> None:
    only_decode = report("1", allowed_roles=frozenset({Role.DECODE}))
    assert registry.heartbeat(only_decode).role is Role.DECODE


def test_silent_workers_drop_out(registry: Registry, clock: ManualClock) -> None:
    join(registry, "1")
    join(registry, "2")
    pass_s(registry, clock, 2.0)
    registry.heartbeat(report("2", role_assigned=True))
    pass_s(registry, clock, 1.5)
    assert [worker.worker_id for worker in registry.snapshot().workers] == ["2"]


def test_a_registry_that_stood_still_has_heard_nobody_and_drops_nobody(
    registry: Registry, clock: ManualClock
) -> None:
    roles = {worker_id: join(registry, worker_id) for worker_id in "123"}
    pass_s(registry, clock, 1.0, roles)
    before = registry.snapshot()
    clock.advance(60.0)
    assert registry.snapshot() == before
    pass_s(registry, clock, 2.5, {"1": roles["1"]})
    assert set(roles_of(registry)) == {"1", "2", "3"}
    pass_s(registry, clock, 1.0, {"1": roles["1"]})
    assert set(roles_of(registry)) == {"1"}, "who says nothing afterwards is gone"
    assert registry.observe().workers[0].age_s == 0.0


def test_only_changes_of_membership_make_an_epoch(registry: Registry) -> None:
    join(registry, "1")
    before = registry.snapshot().epoch
    busy = report("1", role=Role.DECODE, role_assigned=True, load=WorkerLoad(num_running=5))
    role = registry.snapshot().workers[0].role
    registry.heartbeat(replace(busy, role=role))
    assert registry.snapshot().epoch == before
    assert registry.snapshot().workers[0].load.num_running == 5
    registry.heartbeat(replace(busy, role=role, draining=True))
    assert registry.snapshot().epoch == before + 1


def test_a_restarted_registry_publishes_nothing_until_all_have_reported(clock: ManualClock) -> None:
    registry = Registry(CONFIG, clock, "r2")
    registry.heartbeat(report("1", role=Role.PREFILL, role_assigned=True))
    pass_s(registry, clock, 1.5)
    assert registry.snapshot() is None
    pass_s(registry, clock, 0.5)
    assert registry.snapshot() is not None


def test_a_restarted_registry_that_stands_still_has_not_heard_all_yet(clock: ManualClock) -> None:
    registry = Registry(CONFIG, clock, "r2")
    registry.heartbeat(report("1", role=Role.PREFILL, role_assigned=True))
    clock.advance(60.0)
    assert registry.snapshot() is None
    pass_s(registry, clock, 1.5)
    assert registry.snapshot() is None
    pass_s(registry, clock, 0.5)
    assert registry.snapshot() is not None


def test_a_restarted_registry_adopts_the_roles_it_finds(clock: ManualClock) -> None:
    registry = Registry(CONFIG, clock, "r2")
    for worker in "123":  # all switched to decode before the restart
        answer = registry.heartbeat(report(worker, role=Role.DECODE, role_assigned=True))
        assert answer.role is Role.DECODE


def test_a_worker_learns_its_new_role_with_the_next_heartbeat(registry: Registry) -> None:
    role = join(registry, "1")
    other = next(each for each in Role if each is not role)
    registry.assign_role("1", other)
    assert registry.heartbeat(report("1", role=role, role_assigned=True)).role is other


def test_a_role_the_shape_may_not_take_is_refused(registry: Registry) -> None:
    registry.heartbeat(report("1", allowed_roles=frozenset({Role.DECODE})))
    with pytest.raises(ValueError, match="may not take"):
        registry.assign_role("1", Role.PREFILL)
    with pytest.raises(ValueError, match="no worker"):
        registry.assign_role("2", Role.PREFILL)


def test_a_goodbye_of_an_old_start_does_not_remove_the_new_one(registry: Registry) -> None:
    join(registry, "1")
    registry.heartbeat(report("1", incarnation="1-2"))
    registry.leave("1", "1-1")
    assert len(registry.snapshot().workers) == 1
    registry.leave("1", "1-2")
    assert registry.snapshot().workers == ()


def test_peers_are_the_other_workers_of_the_same_model_and_revision(registry: Registry) -> None:
    join(registry, "1")
    join(registry, "2")
    registry.heartbeat(report("3", model="other"))
    registry.heartbeat(report("4", revision="next"))
    assert {peer.incarnation for peer in registry.heartbeat(report("1")).peers} == {"2-1"}


# Role switches.


def roles_of(registry: Registry) -> dict[str, tuple[Role, Role]]:
    """What each worker says and what it should be."""
    return {
        worker.report.worker_id: (worker.report.role, worker.desired_role)
        for worker in registry.observe().workers
    }


def test_a_switch_is_told_again_until_a_report_agrees(registry: Registry) -> None:
    registry.heartbeat(old := report("1", role=Role.DECODE, role_assigned=True))
    registry.assign_role("1", Role.PREFILL)
    for _ in range(3):  # the answers are lost
        assert registry.is_to_change(old)
        assert registry.heartbeat(old).role is Role.PREFILL
        assert roles_of(registry) == {"1": (Role.DECODE, Role.PREFILL)}
    now = report("1", role=Role.PREFILL, role_assigned=True)
    assert registry.heartbeat(now).role is Role.PREFILL
    assert not registry.is_to_change(now)
    assert roles_of(registry) == {"1": (Role.PREFILL, Role.PREFILL)}


def test_of_two_moves_for_one_worker_the_last_one_holds(registry: Registry) -> None:
    registry.heartbeat(report("1", role=Role.DECODE, role_assigned=True))
    registry.assign_role("1", Role.PREFILL)
    registry.assign_role("1", Role.DECODE)
    assert not registry.is_to_change(report("1", role=Role.DECODE, role_assigned=True))
    # It had heard of the first one already, and is told to go back.
    assert registry.heartbeat(report("1", role=Role.PREFILL, role_assigned=True)).role is Role.DECODE


def test_several_workers_switch_at_once_in_both_directions(registry: Registry) -> None:
    before = {"1": Role.PREFILL, "2": Role.DECODE, "3": Role.DECODE}
    for worker_id, role in before.items():
        registry.heartbeat(report(worker_id, role=role, role_assigned=True))
    after = {"1": Role.DECODE, "2": Role.PREFILL, "3": Role.PREFILL}
    for worker_id, role in after.items():
        registry.assign_role(worker_id, role)
    for worker_id, role in before.items():
        told = registry.heartbeat(report(worker_id, role=role, role_assigned=True)).role
        registry.heartbeat(report(worker_id, role=told, role_assigned=True))
    assert roles_of(registry) == {worker_id: (role, role) for worker_id, role in after.items()}


@pytest.mark.parametrize("heard_of_it", [False, True])
def test_a_registry_that_restarts_within_a_switch_adopts_what_the_worker_does(
    clock: ManualClock, heard_of_it: bool
) -> None:
    before = Registry(CONFIG, clock, "r1")
    before.heartbeat(report("1", role=Role.DECODE, role_assigned=True))
    before.assign_role("1", Role.PREFILL)
    role = Role.PREFILL if heard_of_it else Role.DECODE
    after = Registry(CONFIG, clock, "r2")
    assert after.heartbeat(report("1", role=role, role_assigned=True)).role is role
    assert roles_of(after) == {"1": (role, role)}  # for the planner to move on from


def test_who_replaces_a_worker_that_died_within_a_switch_takes_the_role_it_was_to_have(
    registry: Registry, clock: ManualClock
) -> None:
    roles = {worker_id: join(registry, worker_id) for worker_id in "123"}
    died = next(worker_id for worker_id, role in roles.items() if role is Role.DECODE)
    registry.assign_role(died, Role.PREFILL)
    pass_s(registry, clock, 3.5, {key: role for key, role in roles.items() if key != died})
    assert died not in roles_of(registry)
    assert join(registry, "9") is Role.PREFILL
    assert sorted(now for now, _ in roles_of(registry).values()) == [Role.DECODE, Role.PREFILL, Role.PREFILL]


@pytest.mark.parametrize("assigned", [False, True])
def test_a_worker_that_restarts_within_a_switch_is_told_its_new_role(
    registry: Registry, assigned: bool
) -> None:
    registry.heartbeat(report("1", role=Role.DECODE, role_assigned=True))
    registry.assign_role("1", Role.PREFILL)
    again = report("1", incarnation="1-2", role=Role.DECODE, role_assigned=assigned)
    assert registry.heartbeat(again).role is Role.PREFILL


def test_a_restart_that_may_not_take_the_desired_role_gets_one_it_may(registry: Registry) -> None:
    registry.heartbeat(report("1", role=Role.DECODE, role_assigned=True))
    registry.assign_role("1", Role.PREFILL)
    again = report("1", incarnation="1-2", allowed_roles=frozenset({Role.DECODE}))
    assert registry.heartbeat(again).role is Role.DECODE


def test_a_report_that_was_overtaken_does_not_undo_the_later_one(registry: Registry) -> None:
    registry.heartbeat(report("1", role=Role.PREFILL, role_assigned=True, heartbeat=8))
    registry.heartbeat(report("1", role=Role.DECODE, role_assigned=True, heartbeat=7))
    assert registry.snapshot().workers[0].role is Role.PREFILL


def test_a_worker_without_a_role_is_always_to_change(registry: Registry) -> None:
    registry.heartbeat(first := report("1"))
    assert registry.is_to_change(first)


# What the planner sees.


def test_the_planner_sees_workers_and_routers_with_the_age_of_their_word(
    registry: Registry, clock: ManualClock
) -> None:
    join(registry, "1")
    registry.router_heard(TrafficSummary(router_id="a", num_waiting=3))
    pass_s(registry, clock, 1.5)
    registry.router_heard(TrafficSummary(router_id="b"))
    seen = registry.observe()
    assert [worker.age_s for worker in seen.workers] == [1.5]
    assert {router.traffic.router_id: router.age_s for router in seen.routers} == {"a": 1.5, "b": 0.0}
    registry.router_heard(TrafficSummary(router_id="a", num_waiting=4))
    assert [router.traffic.num_waiting for router in registry.observe().routers] == [4, 0]


def test_the_planner_does_not_see_who_is_gone(registry: Registry, clock: ManualClock) -> None:
    join(registry, "1")
    registry.router_heard(TrafficSummary(router_id="a"))
    pass_s(registry, clock, 3.5)
    assert registry.observe().workers == ()
    pass_s(registry, clock, 57.0)
    assert registry.observe().routers == ()


def test_what_a_registry_knew_is_no_older_after_it_stood_still(
    registry: Registry, clock: ManualClock
) -> None:
    """Else the planner would take those whose heartbeat is read last for gone, and move roles to make up."""
    roles = {worker_id: join(registry, worker_id) for worker_id in "12"}
    registry.router_heard(TrafficSummary(router_id="a"))
    clock.advance(100.0)
    registry.heartbeat(report("1", role=roles["1"], role_assigned=True))
    seen = registry.observe()
    assert {worker.report.worker_id: worker.age_s for worker in seen.workers} == {"1": 0.0, "2": 0.0}
    assert [router.age_s for router in seen.routers] == [0.0]


@pytest.mark.parametrize("gap_s", [1.0, 2.0, 2.9])
def test_a_short_standstill_costs_no_more_than_a_heartbeat(
    registry: Registry, clock: ManualClock, gap_s: float
) -> None:
    join(registry, "1")
    clock.advance(gap_s)
    assert [worker.age_s for worker in registry.observe().workers] == [1.0]


def test_the_planner_knows_when_a_registry_has_just_started(clock: ManualClock) -> None:
    registry = Registry(CONFIG, clock, "r2")
    registry.heartbeat(report("1", role=Role.PREFILL, role_assigned=True))
    assert registry.observe().rebuilding
    assert len(registry.observe().workers) == 1
    pass_s(registry, clock, 2.0)
    assert not registry.observe().rebuilding


def complain(registry: Registry, incarnation: str, clock: ManualClock) -> None:
    for count in range(OPENINGS + 1):
        registry.router_heard(TrafficSummary(router_id="a", suspects={incarnation: count}))
        clock.advance(0.1)


def test_a_worker_in_quarantine_drains_for_everybody_and_is_told_why(
    registry: Registry, clock: ManualClock
) -> None:
    for worker_id in "12":
        join(registry, worker_id)
    bad = report("1", role_assigned=True)
    assert not registry.desired_state(bad).quarantined
    epoch = registry.epoch
    complain(registry, "1-1", clock)
    snapshot = registry.snapshot()
    assert snapshot is not None
    assert snapshot.epoch > epoch
    shown = {worker.worker_id: (worker.draining, bool(worker.trouble)) for worker in snapshot.workers}
    assert shown == {"1": (True, True), "2": (False, False)}
    assert [seen.report.draining for seen in registry.observe().workers] == [True, False]
    assert registry.is_to_change(bad)
    told = registry.heartbeat(bad)
    assert told.draining
    assert "routers stopped sending" in told.quarantined
    assert not registry.is_to_change(replace(bad, trouble=told.quarantined, role=told.role))
    registry.heartbeat(report("1", incarnation="1-2", role_assigned=True))
    assert not registry.members()["1"].trouble, "a new start is trusted again"


def test_deaths_make_a_node_suspect_and_goodbyes_do_not(registry: Registry, clock: ManualClock) -> None:
    for number in range(4):
        join(registry, f"left{number}")
        registry.leave(f"left{number}", f"left{number}-1")
        registry.heartbeat(report(f"drained{number}", draining=True))
        pass_s(registry, clock, 5.0)
    registry.heartbeat(report("1"))
    assert registry.suspect_nodes == ()
    join(registry, "silent")
    pass_s(registry, clock, 5.0)
    assert registry.start_failed("s", "n", "no memory") == 1.0
    join(registry, "dead")
    assert registry.leave("dead", "dead-1", "its engine died") == 2.0
    (node,) = registry.suspect_nodes
    assert (node.shape, node.node_id, node.last_reason) == ("s", "n", "its engine died")
    assert node.num_deaths == 4, "two that fell silent, one that could not start, one that died"
    snapshot = registry.snapshot()
    assert snapshot is not None
    assert snapshot.suspect_nodes == (node,)
