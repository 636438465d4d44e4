"""The Serve application: registry, planner, workers by shape, and the routers in front."""

from __future__ import annotations

import os
import secrets
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from core.errors import ConfigError
from core.types import Role
from deploy.app_version import bind_versioned
from deploy.config import load_config, parse_config
from deploy.config_schema import BatonConfig, ModelConfig, ShapeConfig
from deploy.environment import router_environment, worker_environment
from deploy.planner_replica import PlannerReplica
from deploy.planner_settings import planner_replica_settings
from deploy.registry_replica import RegistryReplica
from deploy.router_replica import RouterReplica
from deploy.settings import (
    CLUSTER_KEY_VARIABLE,
    COUNT_BOARD_NAME,
    PLANNER_NAME,
    REGISTRY_NAME,
    ROUTER_NAME,
    bind_host,
    router_settings,
    shutdown_limit_s,
    worker_deployment_name,
    worker_settings,
)
from deploy.worker_replica import WorkerReplica
from kv_transfer.handle import MIN_KEY_BYTES
from planner.count_board import AskedCount
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
    registry = bind_versioned(
        _deployment(RegistryReplica, REGISTRY_NAME, num_cpus=0.0).options(user_config=_initial_split(model)),
        _registry_config(config),
        bind_host(config),
    )
    workers = [
        bind_versioned(
            _worker_deployment(config, shape), worker_settings(config, model, shape, cluster_key), registry
        )
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
    planner = _planner(config, model, registry)
    return bind_versioned(router, router_settings(config, model), registry, planner, *workers)


def _planner(
    config: BatonConfig, model: ModelConfig, registry: serve.Application
) -> serve.Application | None:
    if config.planner.mode == "off":
        return None
    settings = planner_replica_settings(config, model, bind_host(config))
    return bind_versioned(_deployment(PlannerReplica, PLANNER_NAME, num_cpus=0.0), settings, registry)


def _worker_deployment(config: BatonConfig, shape: ShapeConfig) -> serve.Deployment:
    actor: dict[str, Any] = {"runtime_env": {"env_vars": dict(worker_environment(shape))}}
    resources: dict[str, Any] = {}
    cpus, gpus = shape.cpus_per_worker, shape.gpus_per_worker
    if gpus > 1:
        # One bundle: a worker's GPUs are on one node, which is what tensor parallelism wants.
        resources = {"placement_group_bundles": [{"CPU": cpus, "GPU": gpus}]}
        resources["placement_group_strategy"] = "STRICT_PACK"
    actor |= {"num_cpus": cpus, "num_gpus": gpus}
    if len(shape.counts) > 1:
        resources["autoscaling_config"] = _asked_count(shape)
    else:
        resources["num_replicas"] = shape.count
    return serve.deployment(
        name=worker_deployment_name(shape.name),
        max_ongoing_requests=_INTERNAL_CALLS,
        graceful_shutdown_timeout_s=shutdown_limit_s(config),
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1,
        health_check_timeout_s=30,
        max_constructor_retry_count=_START_ATTEMPTS,
        logging_config=_QUIET_LOG,
        ray_actor_options=actor,
        **resources,
    )(WorkerReplica)


def _asked_count(shape: ShapeConfig) -> AutoscalingConfig:
    """As many replicas as the planner asks for, not as many as Serve would think right."""
    policy = {"shape": shape.name, "board": COUNT_BOARD_NAME}
    return AutoscalingConfig(
        min_replicas=shape.counts[0],
        initial_replicas=shape.count,
        max_replicas=shape.counts[-1],
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function=AskedCount, policy_kwargs=policy),
    )


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


def _registry_config(config: BatonConfig) -> RegistryConfig:
    return RegistryConfig(
        heartbeat_s=config.registry.heartbeat_s, missed_heartbeats=config.registry.missed_heartbeats
    )


def _initial_split(model: ModelConfig) -> dict[str, dict[str, int]]:
    """Serve gives it to a running registry too: other counts are no other registry."""
    return {
        shape.name: {Role.PREFILL.value: shape.initial.prefill, Role.DECODE.value: shape.initial.decode}
        for shape in model.shapes
    }


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
