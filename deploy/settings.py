"""What each replica is started with: plain data cut from the configuration, sent through Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.performance_profile import PerformanceProfile
from core.types import Role
from deploy.config_schema import AdmissionConfig, BatonConfig, MockConfig, ModelConfig, ShapeConfig
from router.admission_limits import AdmissionLimits
from simulator.profiles.files import find_profile

APP_NAME = "baton"
LOOPBACK = "127.0.0.1"
_SHUTDOWN_SLACK_S = 15.0
"""What ending an engine may take after the drain."""
CLUSTER_KEY_VARIABLE = "BATON_CLUSTER_KEY"
REGISTRY_NAME = "Registry"
PLANNER_NAME = "Planner"
ROUTER_NAME = "Router"
COUNT_BOARD_NAME = f"{APP_NAME}-worker-counts"
"""The actor through which worker counts reach Ray Serve."""
CONNECTOR_CLASS = "BatonConnector"
CONNECTOR_MODULE = "kv_transfer.connector"
WORKER_EXTENSION = "kv_transfer.worker_extension.BatonWorkerExtension"
STEP_METER = "engine.step_meter.StepMeter"
_WEIGHT_ARGS = (
    *("dtype", "quantization", "hf_overrides", "load_format", "model_loader_extra_config", "model_impl"),
    *("kv_cache_dtype", "logits_processors", "override_generation_config", "generation_config"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One worker replica."""

    model: str
    model_path: str
    revision: str | None
    weights_id: str
    """What the answers depend on: workers that differ in it never share a request or its KV."""
    adapters: Mapping[str, str]
    shape: str
    allowed_roles: frozenset[Role]
    engine: str
    engine_args: Mapping[str, Any]
    mock: Mapping[str, Any]
    kv_events: bool
    """Whether the worker tells routers what its prefix cache holds."""
    kv_buffer_device: str
    connector_options: Mapping[str, Any]
    lease_s: int
    heartbeat_s: float
    startup_timeout_s: float
    drain_timeout_s: float
    hang_timeout_s: float
    bind_host: str | None
    """Address for the worker's ports; None is the node's own."""
    cluster_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """One router replica."""

    model: str
    model_path: str
    revision: str | None
    adapters: Mapping[str, str]
    engine_args: Mapping[str, Any]
    """Of the first shape that runs vLLM: what front end and engines must agree on is in there."""
    vllm_args: tuple[str, ...]
    policy: str
    profiles: Mapping[str, PerformanceProfile]
    """By shape; shapes without one are left out."""
    admission: AdmissionLimits | None
    log_decisions: bool
    max_ongoing_requests: int
    prefill_timeout_s: float
    stall_timeout_s: float
    resume_timeout_s: float
    max_retries: int
    replays: bool
    """Whether every engine can begin an answer with given tokens: vLLM cannot under speculative decoding."""
    ttft_slo_s: float
    tpot_slo_s: float
    startup_timeout_s: float
    bind_host: str | None


def shutdown_limit_s(config: BatonConfig) -> float:
    """What a worker's end may take: requests finish or are handed back, its KV is pulled, its engine ends."""
    return config.drain_timeout_s + config.kv_transfer.lease_s + _SHUTDOWN_SLACK_S


def worker_deployment_name(shape: str) -> str:
    """The Serve deployment of a shape's workers."""
    return f"Worker-{shape}"


def worker_settings(
    config: BatonConfig, model: ModelConfig, shape: ShapeConfig, cluster_key: bytes
) -> WorkerSettings:
    """Cuts one shape's worker settings out of the configuration."""
    return WorkerSettings(
        model=model.name,
        model_path=model.path,
        revision=model.revision,
        weights_id=_weights_id(model, shape),
        adapters={adapter.name: adapter.path for adapter in model.adapters},
        shape=shape.name,
        allowed_roles=frozenset(shape.roles),
        engine=shape.engine,
        engine_args=dict(shape.engine_args),
        mock=(shape.mock or MockConfig()).model_dump() if shape.engine == "mock" else {},
        kv_events=config.router.policy == "predictive" and config.router.cache_events,
        kv_buffer_device=config.kv_transfer.buffer_device,
        connector_options={
            "backends": [config.kv_transfer.backend],
            **config.kv_transfer.backend_params,
        },
        lease_s=config.kv_transfer.lease_s,
        heartbeat_s=config.registry.heartbeat_s,
        startup_timeout_s=config.startup_timeout_s,
        drain_timeout_s=config.drain_timeout_s,
        hang_timeout_s=config.hang_timeout_s,
        bind_host=bind_host(config),
        cluster_key=cluster_key,
    )


def router_settings(config: BatonConfig, model: ModelConfig) -> RouterSettings:
    """Cuts the router settings out of the configuration.

    Raises:
        core.errors.ConfigError: a shape's profile is not to be found, or wrong.
    """
    engine_args: Mapping[str, Any] = next(
        (shape.engine_args for shape in model.shapes if shape.engine == "vllm"), {}
    )
    template = ("--chat-template", config.router.chat_template) if config.router.chat_template else ()
    return RouterSettings(
        model=model.name,
        model_path=model.path,
        revision=model.revision,
        adapters={adapter.name: adapter.path for adapter in model.adapters},
        engine_args=dict(engine_args),
        vllm_args=(*config.router.vllm_args, *template),
        policy=config.router.policy,
        profiles={
            shape.name: find_profile(shape.profile) for shape in model.shapes if shape.profile is not None
        },
        admission=admission_limits(config.router.admission),
        log_decisions=config.router.log_decisions,
        max_ongoing_requests=config.router.max_ongoing_requests,
        prefill_timeout_s=config.router.prefill_timeout_s,
        stall_timeout_s=config.router.stall_timeout_s,
        resume_timeout_s=config.router.resume_timeout_s,
        max_retries=config.router.max_retries,
        replays=not any(shape.engine_args.get("speculative_config") for shape in model.shapes),
        ttft_slo_s=model.slo.ttft_ms / 1000,
        tpot_slo_s=model.slo.tpot_ms / 1000,
        startup_timeout_s=config.startup_timeout_s,
        bind_host=bind_host(config),
    )


def admission_limits(config: AdmissionConfig) -> AdmissionLimits | None:
    """None: everything is sent at once."""
    return AdmissionLimits(**config.model_dump(exclude={"enabled"})) if config.enabled else None


def _weights_id(model: ModelConfig, shape: ShapeConfig) -> str:
    """Digest of model path, revision, adapters and the engine arguments that change what is computed."""
    facts = {
        "path": model.path,
        "revision": model.revision,
        "adapters": {adapter.name: adapter.path for adapter in model.adapters},
        "engine_args": {name: shape.engine_args[name] for name in _WEIGHT_ARGS if name in shape.engine_args},
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def bind_host(config: BatonConfig) -> str | None:
    """Loopback if the cluster is all on this machine and serves nobody else, else each node's own address."""
    return LOOPBACK if config.ray.address is None and config.router.host == LOOPBACK else None
