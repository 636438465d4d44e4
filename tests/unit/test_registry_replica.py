"""The registry's answers that wait: heartbeats until a role changes, snapshots until the membership does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from core.traffic import TrafficSummary
from core.types import Role
from deploy.registry_replica import RegistryReplica
from planner.registry import RegistryConfig
from tests.unit.test_registry import report

LONG_S = 60.0
PREFILL = report("1", role=Role.PREFILL, role_assigned=True)


@pytest.fixture
async def registry() -> AsyncIterator[RegistryReplica]:
    made = RegistryReplica(RegistryConfig(heartbeat_s=0.01, missed_heartbeats=10_000), "127.0.0.1")
    await asyncio.sleep(0.03)  # it publishes after two heartbeats
    yield made
    made._exporter.stop()


async def test_a_heartbeat_is_answered_when_its_time_is_over(registry: RegistryReplica) -> None:
    began_s = time.monotonic()
    desired = await registry.heartbeat(PREFILL, 0.1)
    assert desired.role is Role.PREFILL
    assert 0.1 <= time.monotonic() - began_s < LONG_S


async def test_a_heartbeat_that_waits_is_answered_as_soon_as_the_role_changes(
    registry: RegistryReplica,
) -> None:
    others = [report(worker_id, role=Role.DECODE, role_assigned=True) for worker_id in "23"]
    waiting = [asyncio.create_task(registry.heartbeat(each, LONG_S)) for each in (PREFILL, *others)]
    await asyncio.sleep(0.05)
    began_s = time.monotonic()
    await registry.assign_role("1", Role.DECODE)
    await registry.assign_role("2", Role.PREFILL)
    assert [(await waiting[index]).role for index in (0, 1)] == [Role.DECODE, Role.PREFILL]
    assert time.monotonic() - began_s < LONG_S / 2
    assert not waiting[2].done(), "a worker that keeps its role was woken"
    waiting[2].cancel()


async def test_a_worker_that_does_not_do_yet_what_it_should_is_answered_at_once(
    registry: RegistryReplica,
) -> None:
    async with asyncio.timeout(LONG_S / 2):
        await registry.heartbeat(report("4"), LONG_S)  # has no role
        await registry.heartbeat(PREFILL)
        await registry.assign_role("1", Role.DECODE)
        assert (await registry.heartbeat(PREFILL, LONG_S)).role is Role.DECODE


async def test_a_role_that_changed_wakes_the_routers_and_the_planner_sees_their_traffic(
    registry: RegistryReplica,
) -> None:
    await registry.heartbeat(PREFILL)
    first = await registry.snapshot(TrafficSummary(router_id="a", num_waiting=2), "h:1", None, LONG_S)
    assert first is not None
    known = (first.incarnation, first.epoch)
    waiting = asyncio.create_task(
        registry.snapshot(TrafficSummary(router_id="a", num_waiting=3), "h:1", known, LONG_S)
    )
    await asyncio.sleep(0.05)
    assert not waiting.done()
    seen = await registry.observe("h:2")
    assert [router.traffic.num_waiting for router in seen.routers] == [3]
    async with asyncio.timeout(LONG_S / 2):
        await registry.heartbeat(report("1", role=Role.DECODE, role_assigned=True))
        changed = await waiting
    assert changed is not None
    assert [worker.role for worker in changed.workers] == [Role.DECODE]
    targets = {group["labels"]["process"]: group["targets"] for group in await registry.metrics_targets()}
    assert targets["planner"] == ["h:2"]
    assert targets["router"] == ["h:1"]
