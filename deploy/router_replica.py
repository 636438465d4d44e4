"""A router replica: vLLM's OpenAI application, the relay and the view of the cluster."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

from ray import serve

from core.clock import MonotonicClock
from core.errors import StartupError
from core.garbage import no_collection
from core.step_times import StepTimes
from core.table_step_time import TableStepTime
from core.traffic import TrafficSummary
from core.types import Snapshot
from deploy.node import node_host
from deploy.serve_log import keep_serve_log
from deploy.settings import RouterSettings
from router.cluster_view import ClusterView
from router.policies import make_policy
from router.trace import TraceLog
from router.traffic_counter import TrafficCounter
from router.worker_link import WorkerLink
from telemetry.exporter import new_registry, start_exporter
from telemetry.logs import configure_logging, fields
from telemetry.router_metrics import RouterMetrics
from telemetry.slo import SloTargets

logger = logging.getLogger(__name__)

_LONG_POLL_S = 0.5
"""The planner hears of the traffic as often."""
_ANSWER_TIMEOUT_S = 5.0
_PEER_TIMEOUT_S = 1.0
_RETRY_S = 0.2


@serve.ingress()
class RouterReplica:
    """Deployed with any number of replicas behind HAProxy.

    Args:
        settings: the model's.
        registry: handle of the registry deployment.
        planner: handle of the planner deployment; None if nobody plans.
        workers: handles of the worker deployments, so that one application holds them all; requests
            do not go through them.
    """

    def __init__(self, settings: RouterSettings, registry: Any, planner: Any, *workers: Any) -> None:
        self._settings = settings
        self._registry = registry
        self._planner = planner
        self._router_id = uuid.uuid4().hex[:12]
        self._traffic = TrafficCounter(self._router_id)
        configure_logging(f"router-{self._router_id}")
        keep_serve_log()

    async def __serve_build_asgi_app__(self) -> Any:
        with no_collection():  # most of it is imports, of which they are a sixth
            app = await self._build_app()
        self._watcher = asyncio.create_task(self._watch_cluster(), name="cluster watch")
        await self._wait_for_workers()
        logger.info("router ready", extra=fields(metrics=self._exporter.address))
        return app

    async def _build_app(self) -> Any:
        # Here, not at the top: the process that only names this class needs no vLLM.
        from router.admin_api import admin_routes
        from router.app import FrontDoor, build_openai_app, front_end_config, parse_front_end_args
        from router.engine_client import RelayEngineClient
        from router.lap_context import RelayConfig
        from router.planner_api import planner_routes
        from router.relay import Relay
        from router.tracker import RequestTracker

        settings, clock = self._settings, MonotonicClock()
        args = parse_front_end_args(
            model_path=settings.model_path,
            served_name=settings.model,
            revision=settings.revision,
            engine_args=dict(settings.engine_args),
            adapters=dict(settings.adapters),
            extra=settings.vllm_args,
        )
        metrics_registry = new_registry()
        slo = SloTargets(ttft_s=settings.ttft_slo_s, tpot_s=settings.tpot_slo_s)
        self._metrics = RouterMetrics(metrics_registry, slo_targets={settings.model: slo})
        self._exporter = start_exporter(node_host(self._settings.bind_host), metrics_registry)
        step_times = {shape: TableStepTime(profile) for shape, profile in settings.profiles.items()}
        self._view = ClusterView(
            lambda report, on_load: WorkerLink(report.address, self._router_id, on_load),
            clock,
            StepTimes(step_times.get),
        )
        traces = TraceLog()
        self._relay = relay = Relay(
            self._view,
            make_policy(settings.policy),
            RelayConfig(
                prefill_timeout_s=settings.prefill_timeout_s,
                stall_timeout_s=settings.stall_timeout_s,
                resume_timeout_s=settings.resume_timeout_s,
                max_retries=settings.max_retries,
                replays=settings.replays,
            ),
            clock,
            limits=settings.admission,
            tpot_slo_s=settings.tpot_slo_s,
            traffic=self._traffic,
        )
        self._tracker = RequestTracker(self._metrics, traces, clock, self._traffic)
        self._metrics.queued.set_function(lambda: relay.num_waiting)
        self._client = RelayEngineClient(
            front_end_config(args),
            settings.model,
            relay,
            self._tracker,
            clock,
            self._router_id,
            slo,
            explain_all=settings.log_decisions,
        )
        app = await build_openai_app(self._client, args)
        app.include_router(
            admin_routes(self._view, traces, self._registry.metrics_targets.remote, self._client.explain)
        )
        app.include_router(planner_routes(self._ask_planner))
        return FrontDoor(app)

    async def _wait_for_workers(self) -> None:
        """A router that could only say 503 does not count as ready."""
        async with asyncio.timeout(self._settings.startup_timeout_s):
            while not self._view.candidates(self._settings.model):
                if self._watcher.done():
                    raise StartupError("the cluster watch ended") from self._watcher.exception()
                await asyncio.sleep(0.05)

    async def snapshot(self) -> Snapshot | None:
        """What this router knows of the cluster, for a peer born while the registry is away."""
        return self._view.snapshot

    async def _watch_cluster(self) -> None:
        """Never ends by itself: a router without a watch would go on with an old view for ever."""
        while True:
            try:
                await self._look_once()
            except Exception:
                logger.exception("the cluster watch stumbled")
                await asyncio.sleep(_RETRY_S)

    async def _look_once(self) -> None:
        known = self._view.snapshot
        try:
            snapshot = await asyncio.wait_for(
                self._registry.snapshot.remote(
                    self._summary(),
                    self._exporter.address,
                    (known.incarnation, known.epoch) if known else None,
                    _LONG_POLL_S,
                ),
                _ANSWER_TIMEOUT_S,
            )
        except Exception as error:
            logger.warning("no snapshot from the registry", extra=fields(error=repr(error)))
            snapshot = None
        if snapshot is None:
            if known is None:
                snapshot = await self._ask_a_peer()
            await asyncio.sleep(_RETRY_S)
        if snapshot is not None:
            await self._take(snapshot)

    def _summary(self) -> TrafficSummary:
        return self._traffic.summary(
            num_waiting=self._relay.num_waiting,
            waiting_prompt_tokens=self._relay.waiting_prompt_tokens,
            num_ongoing=self._tracker.num_ongoing,
            suspects=self._view.suspects(),
        )

    async def _take(self, snapshot: Snapshot) -> None:
        self._metrics.snapshot_received(snapshot)
        for member in self._view.update(snapshot):
            await member.close()

    async def _ask_planner(self, last: int, number: int | None, moves: bool) -> dict[str, Any] | None:
        """See :meth:`deploy.planner_replica.PlannerReplica.report`; None without a planner."""
        if self._planner is None:
            return None
        answer = self._planner.report.remote(last, number, moves)
        return dict(await asyncio.wait_for(answer, _ANSWER_TIMEOUT_S))

    async def _ask_a_peer(self) -> Snapshot | None:
        context = serve.get_replica_context()
        try:
            peers = serve.get_deployment_handle(context.deployment, context.app_name)
            return await asyncio.wait_for(peers.snapshot.remote(), _PEER_TIMEOUT_S)
        except Exception as error:
            logger.info("no snapshot from a peer", extra=fields(error=repr(error)))
            return None

    async def __del__(self) -> None:
        """Ray Serve's shutdown hook, after the replica's own streams have ended."""
        if not hasattr(self, "_watcher"):
            return
        self._watcher.cancel()
        self._client.shutdown()
        for member in self._view.members():
            await member.close()
        self._exporter.stop()
