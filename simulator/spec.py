"""The cluster to simulate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import ConfigError
from core.performance_model import KvLink, StepTime
from core.types import Role
from core.worker_events import WorkerModelConfig
from planner.settings import PlannerSettings
from router.admission_limits import AdmissionLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGroup:
    """Workers of one shape."""

    shape: str
    profile_name: str = ""
    """Where the step times come from."""
    num_workers: Mapping[Role, int]
    """How many start in each role."""
    step_time: Mapping[Role, StepTime]
    worker: WorkerModelConfig
    kv_bytes_per_token: int
    link: KvLink
    """How KV enters and leaves one worker."""
    gpus_per_worker: float = 1.0
    startup_s: float = 60.0
    """From the decision to start a worker to its first request."""
    allowed_roles: frozenset[Role] = frozenset(Role)
    assumed_step_time: StepTime | None = None
    """What routers take its steps to last before they have observed any; None: what they do last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Workers, and what the way to them costs.

    Raises:
        core.errors.ConfigError: no worker can decode.
    """

    groups: tuple[WorkerGroup, ...]
    num_routers: int = 1
    ttft_slo_s: float = float("inf")
    tpot_slo_s: float = float("inf")
    """Targets that routers route for."""
    router_s: float = 0.004
    """From a request's arrival at a router to the routing decision: HTTP, template, tokenizer."""
    rpc_s: float = 0.0005
    """One way between router and worker."""
    handoff_s: float = 0.001
    """From a decode worker's taking in a KV handle to the start of its pull."""
    heartbeat_s: float = 1.0
    load_beat_s: float = 0.03
    """How soon a change of a worker's load reaches routers it has no answer for."""
    cache_feed_s: float = 0.05
    """From a change of a worker's prefix cache until routers know of it."""
    max_ongoing_requests: int = 0
    """Requests in flight in one router before more are refused; 0 for no limit."""
    admission: AdmissionLimits | None = None
    """Of each router; None: whatever comes is sent at once."""
    admission_rest_s: float = 0.0
    """From a router's look at its waiting line to the next one at least."""
    prefill_timeout_s: float = 60.0
    stall_timeout_s: float = 30.0
    restart: bool = True
    """A worker that died comes back after its start-up time."""
    role_switch_s: float = 0.1
    """From the registry's giving a worker another role until the worker and all routers know."""
    missed_heartbeats: int = 3
    """A worker that died is present to the planner for this many heartbeats."""
    planner: PlannerSettings | None = None
    """None: roles and counts stay as they are."""

    @property
    def piece_tokens(self) -> int:
        """Tokens under one name of the trace's prompt pieces."""
        worker = self.groups[0].worker
        return worker.hash_block_tokens or worker.block_size_tokens

    def assumed_step_time(self, shape: str) -> StepTime | None:
        """What routers take a shape's steps to last before they have observed any."""
        for group in self.groups:
            if group.shape == shape:
                return group.assumed_step_time or next(iter(group.step_time.values()))
        return None

    def __post_init__(self) -> None:
        if not any(group.num_workers.get(Role.DECODE, 0) for group in self.groups):
            raise ConfigError("no worker decodes: give at least one worker the role decode")
        for group in self.groups:
            for role, count in group.num_workers.items():
                if count and role not in group.allowed_roles:
                    raise ConfigError(f"shape {group.shape!r} may not take the role {role.value!r}")
        if self.num_routers < 1:
            raise ConfigError("num_routers must be at least 1")
