"""From performance profiles to the cluster to simulate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core.errors import ConfigError
from core.performance_profile import PerformanceProfile
from core.table_step_time import TableStepTime
from core.types import Role
from simulator.spec import ClusterSpec, WorkerGroup
from simulator.traces.trace import Trace


def worker_group(
    profile: PerformanceProfile,
    trace: Trace,
    num_workers: Mapping[Role, int],
    *,
    shape: str,
    allowed_roles: frozenset[Role] = frozenset(Role),
    lease_s: float = 30.0,
) -> WorkerGroup:
    """Workers that all perform as ``profile`` says, with prefix caches in pieces as the trace names them.

    Raises:
        ConfigError: the trace's pieces are no multiple of the worker's KV blocks.
    """
    step_time = TableStepTime(profile)
    worker = replace(profile.worker_model_config(), lease_s=lease_s)
    if any(request.block_hashes for request in trace.requests):
        if trace.hash_block_tokens % worker.block_size_tokens:
            raise ConfigError(
                f"trace {trace.name!r} names pieces of {trace.hash_block_tokens} tokens, no multiple of "
                f"profile {profile.name!r}'s KV blocks of {worker.block_size_tokens}"
            )
        worker = replace(worker, hash_block_tokens=trace.hash_block_tokens)
    return WorkerGroup(
        shape=shape,
        profile_name=profile.name,
        num_workers=num_workers,
        step_time=dict.fromkeys(Role, step_time),
        worker=worker,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        link=profile.link,
        gpus_per_worker=profile.gpus_per_worker,
        startup_s=profile.startup_s,
        allowed_roles=allowed_roles,
    )


def static_cluster(
    trace: Trace,
    *,
    prefill: PerformanceProfile,
    num_prefill: int,
    decode: PerformanceProfile,
    num_decode: int,
    **overheads: Any,
) -> ClusterSpec:
    """A split of workers.

    Where both profiles are one, the only shape is called ``worker`` and may take either role; else there
    are the shapes ``prefill`` and ``decode``, each with its one role.

    Args:
        overheads: further fields of :class:`ClusterSpec`.

    Raises:
        ConfigError: no worker decodes, or a profile does not fit the trace.
    """
    if prefill == decode:
        counts = {Role.PREFILL: num_prefill, Role.DECODE: num_decode}
        return ClusterSpec(groups=(worker_group(prefill, trace, counts, shape="worker"),), **overheads)
    sides = (Role.PREFILL, prefill, num_prefill), (Role.DECODE, decode, num_decode)
    groups = tuple(
        worker_group(
            profile,
            trace,
            {role: count},
            shape=role.value,
            allowed_roles=frozenset((role,)),
        )
        for role, profile, count in sides
    )
    return ClusterSpec(groups=groups, **overheads)
