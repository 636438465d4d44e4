"""Named faults: each breaks a running cluster in one way, at a moment that it waits for itself.

A fault is an asynchronous context manager over a :class:`Scene`. Entering it breaks something and gives what
was hit; leaving it ends what lasts, such as a process that is stopped. Every process dies by SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.faults.cluster import FaultCluster, in_thread
from tests.faults.load import Load
from tests.faults.processes import WorkerProcesses, send, titled

STREAM_PIECES = 8
"""Pieces of an answer after which a stream is well under way."""


@dataclass
class Scene:
    """What a fault happens to."""

    cluster: FaultCluster
    load: Load


@dataclass
class Hit:
    """What was broken, and when, in seconds of the monotonic clock."""

    at_s: float = field(default_factory=time.monotonic)
    victims: tuple[str, ...] = ()


Fault = Callable[[Scene], AbstractAsyncContextManager[Hit]]


def kill(*processes: psutil.Process) -> float:
    """Kills them all; returns when."""
    at_s = time.monotonic()
    send(signal.SIGKILL, *processes)
    return at_s


# Workers.


@contextlib.asynccontextmanager
async def kill_prefill_worker_while_prefilling(scene: Scene) -> AsyncIterator[Hit]:
    """Kills a prefill worker that has prompts without a first token."""
    victim = await _busy(scene, "prefill", "waiting_prefill_tokens")
    yield Hit(kill(victim.replica), (victim.worker_id,))


@contextlib.asynccontextmanager
async def kill_prefill_worker_before_the_pull(scene: Scene) -> AsyncIterator[Hit]:
    """Kills a prefill worker that holds prompts for decode workers which have not pulled them yet.

    Decode engines are stopped until it is dead, so that none can have begun.
    """
    engines = await _engines(scene, "decode")
    send(signal.SIGSTOP, *engines)
    try:
        victim = await _busy(scene, "prefill", "num_pinned", within_s=5)
        hit = Hit(kill(victim.replica), (victim.worker_id,))
    finally:
        send(signal.SIGCONT, *engines)
    yield hit


@contextlib.asynccontextmanager
async def kill_decode_worker_before_its_first_token(scene: Scene) -> AsyncIterator[Hit]:
    """Kills a decode worker that was sent requests and has not answered them.

    Decode engines are stopped until then.
    """
    engines = await _engines(scene, "decode")
    send(signal.SIGSTOP, *engines)
    try:
        await _busy(scene, "prefill", "num_pinned", within_s=5)  # it is handed over, and nobody pulls
        await asyncio.sleep(0.2)
        victim = await _busy(scene, "decode", "num_requests")
        hit = Hit(kill(victim.replica), (victim.worker_id,))
    finally:
        send(signal.SIGCONT, *engines)
    yield hit


@contextlib.asynccontextmanager
async def kill_decode_worker_mid_stream(scene: Scene) -> AsyncIterator[Hit]:
    """Kills a decode worker while answers stream from it."""
    await scene.load.wait_until("a stream", lambda: scene.load.streaming(STREAM_PIECES))
    victim = await _busy(scene, "decode", "num_requests")
    yield Hit(kill(victim.replica), (victim.worker_id,))


@contextlib.asynccontextmanager
async def kill_all_prefill_workers(scene: Scene) -> AsyncIterator[Hit]:
    """Kills every prefill worker at once."""
    victims = await in_thread(scene.cluster.of, "prefill")
    yield Hit(kill(*(each.replica for each in victims)), tuple(each.worker_id for each in victims))


@contextlib.asynccontextmanager
async def kill_all_decode_workers(scene: Scene) -> AsyncIterator[Hit]:
    """Kills every decode worker at once."""
    victims = await in_thread(scene.cluster.of, "decode")
    yield Hit(kill(*(each.replica for each in victims)), tuple(each.worker_id for each in victims))


@contextlib.asynccontextmanager
async def kill_engine_core(scene: Scene) -> AsyncIterator[Hit]:
    """Kills the engine of a decode worker whose answers stream; its replica process lives."""
    await scene.load.wait_until("a stream", lambda: scene.load.streaming(STREAM_PIECES))
    victim = await _busy(scene, "decode", "num_requests")
    assert victim.engine is not None
    yield Hit(kill(victim.engine), (victim.worker_id,))


@contextlib.asynccontextmanager
async def stop_prefill_worker_while_prefilling(scene: Scene) -> AsyncIterator[Hit]:
    """Stops (SIGSTOP) replica and engine of a prefill worker that has prompts; they go on in the end."""
    victim = await _busy(scene, "prefill", "waiting_prefill_tokens")
    async with _stopped(victim.worker_id, *victim.all) as hit:
        yield hit


@contextlib.asynccontextmanager
async def stop_decode_worker_mid_stream(scene: Scene) -> AsyncIterator[Hit]:
    """Stops (SIGSTOP) replica and engine of a decode worker while answers stream; they go on in the end."""
    await scene.load.wait_until("a stream", lambda: scene.load.streaming(STREAM_PIECES))
    victim = await _busy(scene, "decode", "num_requests")
    async with _stopped(victim.worker_id, *victim.all) as hit:
        yield hit


@contextlib.asynccontextmanager
async def stop_engine_core_mid_stream(scene: Scene) -> AsyncIterator[Hit]:
    """Stops (SIGSTOP) only the engine of a decode worker: its replica answers and reports on."""
    await scene.load.wait_until("a stream", lambda: scene.load.streaming(STREAM_PIECES))
    victim = await _busy(scene, "decode", "num_requests")
    assert victim.engine is not None
    async with _stopped(victim.worker_id, victim.engine) as hit:
        yield hit


# What is around the workers.


@contextlib.asynccontextmanager
async def kill_router(scene: Scene) -> AsyncIterator[Hit]:
    """Kills one of the routers."""
    routers = await in_thread(scene.cluster.replicas, "Router")
    yield Hit(kill(routers[0]), ("Router",))


@contextlib.asynccontextmanager
async def kill_registry(scene: Scene) -> AsyncIterator[Hit]:
    """Kills the registry."""
    yield Hit(kill(*await in_thread(scene.cluster.replicas, "Registry")), ("Registry",))


@contextlib.asynccontextmanager
async def stop_registry(scene: Scene) -> AsyncIterator[Hit]:
    """Stops (SIGSTOP) the registry, which reads nobody's heartbeat until the end."""
    async with _stopped("Registry", *await in_thread(scene.cluster.replicas, "Registry")) as hit:
        yield hit


@contextlib.asynccontextmanager
async def hold_planner_down(scene: Scene) -> AsyncIterator[Hit]:
    """Kills the planner, again whenever it comes back, until the end."""
    async with _held_down(scene, "Planner") as hit:
        yield hit


@contextlib.asynccontextmanager
async def hold_planner_and_registry_down_and_kill_a_router(scene: Scene) -> AsyncIterator[Hit]:
    """Keeps the whole control plane dead until the end, and kills a router, whose successor has to serve."""
    async with _held_down(scene, "Planner", "Registry") as hit:
        await asyncio.sleep(2)
        (router, *_) = await in_thread(scene.cluster.replicas, "Router")
        kill(router)
        yield hit


@contextlib.asynccontextmanager
async def kill_serve_controller(scene: Scene) -> AsyncIterator[Hit]:
    """Kills Ray Serve's controller, and waits in the end until there is another one."""
    controllers = await in_thread(scene.cluster.named, "ServeController")
    assert controllers
    yield Hit(kill(*controllers), ("ServeController",))
    deadline_s = time.monotonic() + 60
    while not set(await in_thread(scene.cluster.named, "ServeController")) - set(controllers):
        assert time.monotonic() < deadline_s, "no new Serve controller"
        await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def kill_haproxy(scene: Scene) -> AsyncIterator[Hit]:
    """Kills HAProxy, master and workers."""
    processes = await in_thread(haproxy_processes, scene.cluster)
    assert processes
    yield Hit(kill(*processes), ("HAProxy",))


def haproxy_processes(cluster: FaultCluster) -> list[psutil.Process]:
    found = []
    for process in cluster.processes():
        with contextlib.suppress(psutil.Error):
            if "haproxy" in process.name().lower():
                found.append(process)
    return found


# Changes that are no accidents.


@contextlib.asynccontextmanager
async def switch_every_role_back_and_forth(scene: Scene) -> AsyncIterator[Hit]:
    """Gives each worker the other role and back, one after another, then all of them twice at once."""
    hit = Hit()
    cluster = scene.cluster
    roles = {worker["worker_id"]: worker["role"] for worker in await in_thread(cluster.workers)}
    other = {"prefill": "decode", "decode": "prefill"}
    for worker_id, role in roles.items():
        await in_thread(cluster.assign, {worker_id: other[role]})
        await asyncio.sleep(0.5)
        await in_thread(cluster.assign, {worker_id: role})
        await asyncio.sleep(0.3)
    for _ in range(2):
        await in_thread(cluster.assign, {worker_id: other[role] for worker_id, role in roles.items()})
        await asyncio.sleep(0.7)
        await in_thread(cluster.assign, roles)
        await asyncio.sleep(0.7)
    hit.victims = tuple(roles)
    yield hit


@contextlib.asynccontextmanager
async def scale_down(scene: Scene) -> AsyncIterator[Hit]:
    """Asks for three workers in place of four while answers stream; in the end for four again.

    Ray Serve chooses who goes; one decode worker or one prefill worker less is what is wanted.
    """
    cluster = scene.cluster
    (shape,) = cluster.config["models"][0]["shapes"]
    num_prefill, num_decode = cluster.split
    await scene.load.wait_until("a stream", lambda: scene.load.streaming(STREAM_PIECES))
    before = {worker["worker_id"] for worker in await in_thread(cluster.workers)}
    hit = Hit()
    fewer = {"prefill": num_prefill - 1, "decode": num_decode}
    await in_thread(cluster.apply, lambda _: shape.update(count=num_prefill + num_decode - 1, initial=fewer))
    deadline_s = time.monotonic() + 60
    while len(left := {worker["worker_id"] for worker in await in_thread(cluster.workers)}) == len(before):
        assert time.monotonic() < deadline_s, "no worker has left"
        await asyncio.sleep(0.2)
    hit.victims = tuple(before - left)
    yield hit
    whole = {"prefill": num_prefill, "decode": num_decode}
    await in_thread(cluster.apply, lambda _: shape.update(count=num_prefill + num_decode, initial=whole))


# Parts.


async def _engines(scene: Scene, role: str) -> list[psutil.Process]:
    return [each.engine for each in await in_thread(scene.cluster.of, role) if each.engine is not None]


async def _busy(scene: Scene, role: str, what: str, within_s: float = 20.0) -> WorkerProcesses:
    """The worker of a role that has most of something, once one has any, as a router tells."""
    processes = await in_thread(scene.cluster.worker_processes)
    deadline_s = time.monotonic() + within_s
    while True:
        with contextlib.suppress(httpx.HTTPError):
            workers = await in_thread(scene.cluster.workers)
            busy = [each for each in workers if each["role"] == role and each["worker_id"] in processes]
            most = max(busy, key=lambda each: each[what], default=None)
            if most is not None and most[what] > 0:
                return processes[most["worker_id"]]
        assert time.monotonic() < deadline_s, f"no {role} worker has {what} after {within_s:g} s"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def _stopped(victim: str, *processes: psutil.Process) -> AsyncIterator[Hit]:
    hit = Hit(victims=(victim,))
    send(signal.SIGSTOP, *processes)
    try:
        yield hit
    finally:
        send(signal.SIGCONT, *processes)


@contextlib.asynccontextmanager
async def _held_down(scene: Scene, *deployments: str) -> AsyncIterator[Hit]:
    def kill_all() -> None:
        family: Any = scene.cluster.processes()
        for deployment in deployments:
            kill(*titled(titled(family, "ServeReplica"), f":{deployment}"))

    async def again() -> None:
        while True:
            await in_thread(kill_all)
            await asyncio.sleep(1.0)

    hit = Hit(victims=deployments)
    killing = asyncio.create_task(again())
    try:
        yield hit
    finally:
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
