"""The Serve application: registry, workers by shape, and the routers in front."""

from __future__ import annotations

import os
import secrets
from typing import Any

from ray import serve

from core.errors import ConfigError
from core.types import Role
from deploy.config import load_config, parse_config
from deploy.config_schema import BatonConfig, ModelConfig, ShapeConfig
from deploy.environment import router_environment, worker_environment
from deploy.registry_replica import RegistryReplica
from deploy.router_replica import RouterReplica
from deploy.settings import (
    CLUSTER_KEY_VARIABLE,
    REGISTRY_NAME,
    ROUTER_NAME,
    SHUTDOWN_SLACK_S,
    bind_host,
    router_settings,
    worker_settings,
)
from deploy.worker_replica import WorkerReplica
from kv_transfer.handle import MIN_KEY_BYTES
from planner.registry import RegistryConfig

_INTERNAL_CALLS = 10_000
_QUIET_LOG = {"enable_access_log": False, "log_level": "WARNING"}
_START_ATTEMPTS = 2
"""A replica that cannot start twice will not start a third time."""


def build(args: dict[str, Any]) -> serve.Application:
    """Application builder for Serve's own tools (``serve run``, KubeRay's RayService).

    Args:
        args: ``config``: path of a configuration file, or the configuration itself as a mapping.

    Raises:
        core.errors.ConfigError: the configuration is wrong.
    """
    config = args.get("config")
    if isinstance(config, dict):
        return build_application(parse_config(config))
    return build_application(load_config(str(config)))


def build_application(config: BatonConfig) -> serve.Application:
    """One application with every deployment of the cluster in it."""
    (model,) = config.models
    cluster_key = _cluster_key()
    registry = _deployment(RegistryReplica, REGISTRY_NAME, num_cpus=0.0).bind(
        _registry_config(config, model), bind_host(config)
    )
    workers = [
        _worker_deployment(config, shape).bind(worker_settings(config, model, shape, cluster_key), registry)
        for shape in model.shapes
    ]
    router = serve.deployment(
        name=ROUTER_NAME,
        num_replicas=config.router.replicas,
        max_ongoing_requests=config.router.max_ongoing_requests,
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        max_constructor_retry_count=_START_ATTEMPTS,
        logging_config=_QUIET_LOG,
        ray_actor_options={
            "num_cpus": 0.0,
            "runtime_env": {"env_vars": dict(router_environment())},
        },
    )(RouterReplica)
    return router.bind(router_settings(config, model), registry, *workers)


def _worker_deployment(config: BatonConfig, shape: ShapeConfig) -> serve.Deployment:
    actor: dict[str, Any] = {"runtime_env": {"env_vars": dict(worker_environment(shape))}}
    resources: dict[str, Any] = {}
    cpus, gpus = shape.cpus_per_worker, shape.gpus_per_worker
    if gpus > 1:
        # One bundle: a worker's GPUs are on one node, which is what tensor parallelism wants.
        resources = {"placement_group_bundles": [{"CPU": cpus, "GPU": gpus}]}
        resources["placement_group_strategy"] = "STRICT_PACK"
    actor |= {"num_cpus": cpus, "num_gpus": gpus}
    return serve.deployment(
        name=f"Worker-{shape.name}",
        num_replicas=shape.count,
        max_ongoing_requests=_INTERNAL_CALLS,
        graceful_shutdown_timeout_s=config.drain_timeout_s + SHUTDOWN_SLACK_S,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1,
        health_check_timeout_s=30,
        max_constructor_retry_count=_START_ATTEMPTS,
        logging_config=_QUIET_LOG,
        ray_actor_options=actor,
        **resources,
    )(WorkerReplica)


def _deployment(cls: type, name: str, *, num_cpus: float) -> serve.Deployment:
    return serve.deployment(
        name=name,
        num_replicas=1,
        max_ongoing_requests=_INTERNAL_CALLS,
        graceful_shutdown_timeout_s=2,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2,
        logging_config=_QUIET_LOG,
        ray_actor_options={"num_cpus": num_cpus},
    )(cls)


def _registry_config(config: BatonConfig, model: ModelConfig) -> RegistryConfig:
    return RegistryConfig(
        heartbeat_s=config.registry.heartbeat_s,
        missed_heartbeats=config.registry.missed_heartbeats,
        initial_split={
            shape.name: {Role.PREFILL: shape.initial.prefill, Role.DECODE: shape.initial.decode}
            for shape in model.shapes
        },
    )


def _cluster_key() -> bytes:
    """Signs KV handles.

    Taken from the environment if it is there: a key made anew at each build would make every change of
    the application a change of all its workers.

    Raises:
        ConfigError: the given key is too short.
    """
    given = os.environ.get(CLUSTER_KEY_VARIABLE, "")
    if given and len(given) < MIN_KEY_BYTES:
        raise ConfigError(f"{CLUSTER_KEY_VARIABLE}: needs at least {MIN_KEY_BYTES} characters")
    return given.encode() if given else secrets.token_bytes(32)
