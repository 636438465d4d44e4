"""The router without Ray: the application of ``deploy.router_replica`` behind uvicorn, its workers given."""

from __future__ import annotations

import argparse
import asyncio
import gc
import uuid
from typing import Any

import uvicorn

from benchmarks.stream_transport import StreamLink
from core.clock import MonotonicClock
from core.types import Role, Snapshot, WorkerReport
from deploy.settings import LOOPBACK
from router.admin_api import admin_routes
from router.app import FrontDoor, build_openai_app, front_end_config, parse_front_end_args
from router.cluster_view import ClusterView
from router.engine_client import RelayEngineClient
from router.lap_context import RelayConfig
from router.policy import LeastLoadPolicy
from router.relay import Relay
from router.trace import TraceLog
from router.tracker import RequestTracker
from router.traffic_counter import TrafficCounter
from router.worker_link import WorkerLink
from telemetry.exporter import new_registry
from telemetry.router_metrics import RouterMetrics
from telemetry.slo import SloTargets

LINKS = {"frames": WorkerLink, "streams": StreamLink}


def _report(model: str, role: Role, address: str) -> WorkerReport:
    return WorkerReport(
        worker_id=f"{role.value}-{address}",
        incarnation=address,
        model=model,
        revision="",
        shape="mock",
        allowed_roles=frozenset(Role),
        role=role,
        role_assigned=True,
        draining=False,
        address=address,
        node_id="",
        metrics_address="",
        block_size_tokens=16,
        num_kv_blocks=1_000_000,
        bytes_per_block=1024,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
    )


async def _application(arguments: argparse.Namespace) -> Any:
    model, clock, router_id = arguments.model_name, MonotonicClock(), uuid.uuid4().hex[:12]
    args = parse_front_end_args(
        model_path=arguments.model_path,
        served_name=model,
        revision=None,
        engine_args={"max_model_len": 4096},
        adapters={},
        extra=(),
    )
    slo = SloTargets(ttft_s=2.0, tpot_s=0.2)
    metrics = RouterMetrics(new_registry(), slo_targets={model: slo})
    link = LINKS[arguments.transport]
    view = ClusterView(lambda report, on_load: link(report.address, router_id, on_load), clock)
    workers = [_report(model, Role.PREFILL, address) for address in arguments.prefill]
    workers += [_report(model, Role.DECODE, address) for address in arguments.decode]
    view.update(Snapshot(incarnation="static", epoch=1, workers=tuple(workers)))
    traces = TraceLog()
    traffic = TrafficCounter(router_id)
    relay = Relay(
        view,
        LeastLoadPolicy(),
        RelayConfig(prefill_timeout_s=60.0, stall_timeout_s=60.0),
        clock,
        traffic=traffic,
    )
    tracker = RequestTracker(metrics, traces, clock, traffic)
    client = RelayEngineClient(front_end_config(args), model, relay, tracker, clock, router_id, slo)
    app = await build_openai_app(client, args)
    app.include_router(admin_routes(view, traces, _no_targets, client.explain))
    async with asyncio.timeout(30):
        while len(view.candidates(model)) < len(workers):  # noqa: ASYNC110  links have no such event
            await asyncio.sleep(0.05)
    return FrontDoor(app)


async def _no_targets() -> list[dict[str, Any]]:
    return []


async def _serve(arguments: argparse.Namespace) -> None:
    app = await _application(arguments)
    config = uvicorn.Config(
        app, host=LOOPBACK, port=arguments.port, lifespan="off", access_log=False, log_level="warning"
    )
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    await uvicorn.Server(config).serve()


def main() -> None:
    """Prints ``ready`` when it is about to serve."""
    import uvloop

    parser = argparse.ArgumentParser()
    parser.add_argument("--transport", choices=LINKS, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--prefill", action="append", required=True, help="address of a prefill worker")
    parser.add_argument("--decode", action="append", required=True, help="address of a decode worker")
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
