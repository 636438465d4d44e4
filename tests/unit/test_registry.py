"""The registry: membership, roles, epochs, and what a restart may publish."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.clock import ManualClock
from core.types import Role, WorkerLoad, WorkerReport
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
    clock.advance(2.0)
    return made


def join(registry: Registry, worker_id: str) -> Role:
    """Heartbeats of a new worker until it has the role it was told."""
    role = registry.heartbeat(report(worker_id)).role
    registry.heartbeat(report(worker_id, role=role, role_assigned=True))
    return role


def test_new_workers_fill_the_initial_split(registry: Registry) -> None:
    roles = [join(registry, str(n)) for n in range(3)]
    assert sorted(roles) == [Role.DECODE, Role.DECODE, Role.PREFILL]


def test_a_replacement_takes_the_role_of_the_one_that_died(registry: Registry, clock: ManualClock) -> None:
    roles = {str(n): join(registry, str(n)) for n in range(3)}
    dead = next(worker for worker, role in roles.items() if role is Role.PREFILL)
    clock.advance(3.5)
    for worker in roles:
        if worker != dead:
            registry.heartbeat(report(worker, role=roles[worker], role_assigned=True))
    assert join(registry, "9") is Role.PREFILL


def test_a_worker_is_only_given_roles_it_may_take(registry: Registry) -> None:
    only_decode = report("1", allowed_roles=frozenset({Role.DECODE}))
    assert registry.heartbeat(only_decode).role is Role.DECODE


def test_silent_workers_drop_out(registry: Registry, clock: ManualClock) -> None:
    join(registry, "1")
    join(registry, "2")
    clock.advance(2.0)
    registry.heartbeat(report("2", role_assigned=True))
    clock.advance(1.5)
    assert [worker.worker_id for worker in registry.snapshot().workers] == ["2"]


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
    clock.advance(1.9)
    assert registry.snapshot() is None
    clock.advance(0.2)
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
