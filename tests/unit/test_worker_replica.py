"""A worker in trouble, without Ray: what it tells the registry and Ray Serve, and when it is well again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import StartupError, WorkerLost
from core.types import DesiredState, Role, WorkerReport
from deploy import engine_watch, worker_replica
from deploy.config_schema import MockConfig
from deploy.settings import WorkerSettings
from deploy.worker_replica import WorkerReplica

SETTINGS = WorkerSettings(
    model="m",
    model_path="",
    revision=None,
    weights_id="w",
    adapters={},
    shape="s",
    allowed_roles=frozenset(Role),
    engine="mock",
    engine_args={},
    mock=MockConfig().model_dump(),
    kv_events=False,
    kv_buffer_device="cpu",
    connector_options={},
    lease_s=1,
    heartbeat_s=0.05,
    startup_timeout_s=10.0,
    drain_timeout_s=1.0,
    hang_timeout_s=0.3,
    bind_host="127.0.0.1",
    cluster_key=b"k" * 32,
)


class Registry:
    """The registry's handle, and what was said to it."""

    def __init__(self) -> None:
        self.reports: list[WorkerReport] = []
        self.farewells: list[str] = []
        self.failed_starts: list[str] = []
        self.quarantined = ""
        self.delay_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self, f"_{name}"))

    async def _heartbeat(self, report: WorkerReport, wait_s: float = 0.0) -> DesiredState:
        self.reports.append(report)
        return DesiredState(role=Role.DECODE, quarantined=self.quarantined)

    async def _leave(self, _worker_id: str, _incarnation: str, died_of: str = "") -> float:
        self.farewells.append(died_of)
        return self.delay_s

    async def _start_failed(self, _shape: str, _node_id: str, reason: str) -> float:
        self.failed_starts.append(reason)
        return self.delay_s

    @property
    def last(self) -> WorkerReport:
        return self.reports[-1]


class Worker(WorkerReplica):
    """Its shutdown hook is called by name: here, Python would call it too when it frees the object."""

    def __del__(self) -> None:  # type: ignore[override]
        pass

    async def end(self) -> None:
        await super().__del__()


async def started(registry: Registry) -> Worker:
    worker = Worker.__new__(Worker)
    await worker.__init__(SETTINGS, registry)  # type: ignore[misc]  # as Serve does it
    return worker


@pytest.fixture(autouse=True)
def inside_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "PROBE_PERIOD_S", 0.05)
    monkeypatch.setattr(engine_watch, "WATCH_S", 0.02)
    replica = SimpleNamespace(replica_id=SimpleNamespace(unique_id="1"))
    monkeypatch.setattr(worker_replica.serve, "get_replica_context", lambda: replica)
    context = SimpleNamespace(get_node_id=lambda: "n")
    monkeypatch.setattr(worker_replica.ray, "get_runtime_context", lambda: context)
    for name in ("configure_logging", "keep_serve_log"):
        monkeypatch.setattr(worker_replica, name, lambda *_: None)


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
async def worker(registry: Registry) -> AsyncIterator[Worker]:
    worker = await started(registry)
    await until(lambda: bool(registry.reports) and registry.last.role_assigned)
    yield worker
    await worker.end()


async def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  what is waited for is somebody else's state
            await asyncio.sleep(0.01)


def stop_answering(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The engine's calls wait for the event, for a while."""
    again = asyncio.Event()

    async def settle() -> None:
        try:
            await asyncio.wait_for(again.wait(), 0.2)
        except TimeoutError as error:
            raise WorkerLost("the engine did not answer") from error

    monkeypatch.setattr(worker._engine, "settle", settle)
    return again


async def test_an_engine_that_hangs_is_reported_and_taken_back_when_it_answers(
    worker: Worker, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.hang_watch._LOST_AFTER", 1000.0)
    again = stop_answering(worker, monkeypatch)
    await until(lambda: bool(registry.last.trouble))
    assert registry.last.draining
    assert "has not answered" in registry.last.trouble
    await worker.check_health()
    again.set()
    await until(lambda: not registry.last.trouble)
    assert not registry.last.draining
    await worker.check_health()


async def test_an_engine_that_hangs_for_long_is_replaced(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_answering(worker, monkeypatch)
    await until(lambda: worker._hang.lost)
    with pytest.raises(RuntimeError, match="has not answered"):
        await worker.check_health()


async def test_a_quarantined_worker_takes_nothing_says_so_and_asks_to_be_replaced(
    worker: Worker, registry: Registry
) -> None:
    registry.quarantined = "routers stopped sending to it"
    await until(lambda: registry.last.trouble == "routers stopped sending to it")
    assert registry.last.draining
    with pytest.raises(RuntimeError, match="routers stopped sending"):
        await worker.check_health()
    registry.quarantined = ""  # a new registry knows nothing of it
    reports = len(registry.reports)
    await until(lambda: len(registry.reports) > reports + 2)
    assert registry.last.trouble


async def test_a_worker_whose_engine_dies_leaves_at_once_and_is_replaced(
    worker: Worker, registry: Registry
) -> None:
    worker._engine.kill()
    await until(lambda: registry.farewells == ["its engine died"])
    await until(lambda: worker._replace_at_s < float("inf"))
    with pytest.raises(RuntimeError, match="the engine died"):
        await worker.check_health()


async def test_where_workers_die_early_the_next_one_is_asked_for_later(
    worker: Worker, registry: Registry
) -> None:
    registry.delay_s = 60.0
    worker._engine.kill()
    await until(lambda: worker._replace_at_s < float("inf"))
    await worker.check_health()


async def test_an_engine_that_cannot_start_is_told_of_before_the_next_attempt(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Sequence[object]) -> None:
        raise StartupError("no memory")

    monkeypatch.setattr(worker_replica, "start_engine", fail)
    with pytest.raises(StartupError, match="no memory"):
        await started(registry)
    assert registry.failed_starts == ["no memory"]


async def test_a_worker_that_is_told_to_go_did_not_die(registry: Registry) -> None:
    worker = await started(registry)
    await worker.end()
    assert registry.last.draining
    assert registry.farewells == [""]
