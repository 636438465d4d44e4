"""Processes of a cluster as Prometheus sees them: real metric objects, made-up requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle

from prometheus_client import CollectorRegistry

from core.request import Leg, Path
from core.types import Role, Snapshot, WorkerLoad, WorkerReport
from telemetry.exporter import ScrapeTarget, http_sd, new_registry, start_exporter, worker_targets
from telemetry.planner_metrics import PlannerMetrics
from telemetry.registry_metrics import RegistryMetrics
from telemetry.router_metrics import RequestMetrics, RouterMetrics
from telemetry.slo import Outcome, SloTargets
from telemetry.worker_metrics import WorkerMetrics

HOST = "127.0.0.1"
MODEL = "tiny-llama"
TENANTS = ("", "acme")
TARGETS = SloTargets(ttft_s=0.5, tpot_s=0.05)
TICK_S = 0.05
LEG_S = {leg: 0.001 * (i + 1) for i, leg in enumerate(Leg)}


@dataclass(frozen=True)
class Ending:
    """One way a request goes."""

    path: Path
    outcome: Outcome
    ttft_s: float | None
    e2e_s: float
    num_output_tokens: int


ENDINGS = (
    Ending(Path.REMOTE_EARLY, Outcome.OK, 0.2, 0.5, 11),
    Ending(Path.REMOTE, Outcome.OK, 0.2, 0.5, 11),
    Ending(Path.LOCAL, Outcome.OK, 0.2, 0.5, 11),
    Ending(Path.PREFILL_ONLY, Outcome.OK, 0.2, 0.2, 1),
    Ending(Path.REMOTE, Outcome.OK, 0.9, 1.2, 11),  # misses TTFT
    Ending(Path.REMOTE, Outcome.OK, 0.2, 1.2, 11),  # misses TPOT
    Ending(Path.LOCAL, Outcome.FAILED, None, 0.1, 0),
    Ending(Path.NONE, Outcome.REJECTED, None, 0.001, 0),
)
"""Four of eight meet the SLO; two fail or are rejected."""


class SimulatedCluster:
    """One router, a prefill and a decode worker, a registry and a planner, each with its own endpoint."""

    def __init__(self) -> None:
        registries = [new_registry() for _ in range(5)]
        router, prefill, decode, registry, planner = registries
        self._router = RouterMetrics(router, slo_targets={MODEL: TARGETS})
        self._workers = {
            Role.PREFILL: _started_worker(prefill, "prefill-0", Role.PREFILL),
            Role.DECODE: _started_worker(decode, "decode-0", Role.DECODE),
        }
        self._registry = RegistryMetrics(registry)
        self._registry.set_publishing(True)
        self._planner = PlannerMetrics(planner, model=MODEL, mode="auto")
        self._endings = cycle(ENDINGS)
        self._endpoints = [start_exporter(HOST, each) for each in registries]
        self._snapshot = Snapshot(
            incarnation="i1",
            epoch=3,
            workers=(
                _report("prefill-0", Role.PREFILL, self._endpoints[1].address),
                _report("decode-0", Role.DECODE, self._endpoints[2].address),
            ),
        )

    @property
    def addresses(self) -> list[str]:
        """Endpoints of router, prefill worker, decode worker, registry and planner."""
        return [endpoint.address for endpoint in self._endpoints]

    def service_discovery(self) -> bytes:
        """What a router answers at /baton/prometheus-sd."""
        targets = [
            ScrapeTarget(address=self.addresses[0], labels={"process": "router", "node": "n1"}),
            *worker_targets(self._snapshot),
            ScrapeTarget(address=self.addresses[3], labels={"process": "registry", "node": "n1"}),
            ScrapeTarget(address=self.addresses[4], labels={"process": "planner", "node": "n1"}),
        ]
        return json.dumps(http_sd(targets)).encode()

    def tick(self) -> None:
        """A moment in the cluster: every kind of request ends once for every tenant."""
        for _ in ENDINGS:
            ending = next(self._endings)
            for tenant in TENANTS:
                _run(self._router.for_request(MODEL, tenant=tenant), ending)
        for role, worker in self._workers.items():
            worker.set_load(WorkerLoad(num_running=4, num_waiting=1, kv_used_blocks=30, num_pinned=2))
            worker.prompt_computed(queue_s=0.01, prefill_s=0.1, num_tokens=100, num_cached_tokens=20)
            worker.tokens_sampled(40)
            worker.finished(role, "length")
            worker.leases_expired()
            self._registry.heartbeat(MODEL)
        self._workers[Role.DECODE].kv_pulled(1 << 20, 0.02)
        self._router.snapshot_received(self._snapshot)
        self._registry.set_snapshot(self._snapshot)
        self._registry.snapshot_served()
        self._registry.role_switched(MODEL, Role.PREFILL, Role.DECODE)
        self._registry.worker_dropped(MODEL, "silent")
        self._plan()

    def _plan(self) -> None:
        planner = self._planner
        for role in Role:
            planner.present.labels(role).set(1)
            planner.wanted.labels(role).set(1)
            planner.step_factor.labels("cpu", role, "decode").set(1.1)
        planner.decisions.labels("move").inc()
        planner.role_changes.labels(Role.PREFILL, Role.DECODE).inc()
        planner.failures.labels("observe").inc()
        planner.cpu.observe(0.01)
        planner.set_attainment(current=0.8, chosen=0.95)
        planner.set_inputs({"rate_rps": 3.0})
        planner.observation_age.set(0.5)

    def stop(self) -> None:
        """Closes the endpoints."""
        for endpoint in self._endpoints:
            endpoint.stop()


@contextmanager
def running_cluster() -> Iterator[tuple[SimulatedCluster, str]]:
    """A cluster under load, and the host:port where its service discovery answers."""
    cluster = SimulatedCluster()
    with ExitStack() as stack:
        stack.callback(cluster.stop)
        stack.enter_context(_repeating(cluster.tick))
        yield cluster, stack.enter_context(_serving(cluster.service_discovery))


def _run(request: RequestMetrics, ending: Ending) -> None:
    request.arrived()
    if ending.path is not Path.NONE:
        request.prompt(num_tokens=100, num_cached_tokens=20)
        for leg, seconds in LEG_S.items():
            request.leg(leg, seconds)
    if ending.ttft_s is not None:
        request.first_token(ending.ttft_s)
        for _ in range(ending.num_output_tokens - 1):
            request.next_tokens((ending.e2e_s - ending.ttft_s) / (ending.num_output_tokens - 1))
    if ending.path is Path.REMOTE:
        request.kv_transferred(1 << 20)
        request.prefill_fell_back("overloaded")
        request.kv_recomputed("lease_expired")
    request.finished(
        ending.path,
        ending.outcome,
        e2e_s=ending.e2e_s,
        ttft_s=ending.ttft_s,
        num_output_tokens=ending.num_output_tokens,
    )


def _started_worker(registry: CollectorRegistry, worker_id: str, role: Role) -> WorkerMetrics:
    worker = WorkerMetrics(registry, model=MODEL, shape="cpu", worker_id=worker_id)
    worker.set_role(role)
    worker.set_draining(False)
    worker.set_capacity(100)
    worker.set_startup({"imports": 3.0, "engine": 4.0})
    return worker


def _report(worker_id: str, role: Role, metrics_address: str) -> WorkerReport:
    return WorkerReport(
        worker_id=worker_id,
        incarnation="e1",
        model=MODEL,
        revision="main",
        shape="cpu",
        allowed_roles=frozenset(Role),
        role=role,
        role_assigned=True,
        draining=False,
        address=f"{HOST}:1",
        node_id="n1",
        metrics_address=metrics_address,
        block_size_tokens=16,
        num_kv_blocks=100,
        bytes_per_block=1024,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )


@contextmanager
def _repeating(action: Callable[[], None]) -> Iterator[None]:
    stopped = threading.Event()

    def repeat() -> None:
        while not stopped.wait(TICK_S):
            action()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@contextmanager
def _serving(body: Callable[[], bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/baton/prometheus-sd" else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"{HOST}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
