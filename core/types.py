"""What the parts of Baton say to each other about workers: roles, loads, reports, snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from core.observed_steps import StepObservation
from core.record import record


class Role(StrEnum):
    """What a worker does now. State, not class: it changes without an engine restart."""

    PREFILL = "prefill"
    DECODE = "decode"


@record
class WorkerLoad:
    """A worker's load at one moment, as its engine counts it."""

    num_running: int = 0
    """Requests in the running batch."""
    num_decoding: int = 0
    """Of those, how many have their first token and get more of them here."""
    num_waiting: int = 0
    """Requests queued in front of the engine or inside it."""
    waiting_prefill_tokens: int = 0
    """Prompt tokens of requests that have not produced their first token."""
    kv_used_blocks: int = 0
    """KV blocks held by requests: running, waiting for a pull, or pinned for a pull."""
    num_pinned: int = 0
    """Prefilled prompts whose KV waits to be pulled."""
    num_expired_leases: int = 0
    """Leases of pinned KV that have ended unused, since the engine's start."""


@record
class WorkerReport:
    """One heartbeat: who the worker is and how it does."""

    worker_id: str
    incarnation: str
    """New for every engine start; a KV handle of another incarnation is stale."""
    model: str
    revision: str
    """Identity of the weights and of all else that answers depend on."""
    shape: str
    allowed_roles: frozenset[Role]
    role: Role
    role_assigned: bool
    """False until a registry has said which role to take."""
    draining: bool
    address: str
    """host:port of the worker's gRPC server."""
    node_id: str
    metrics_address: str
    """host:port of the worker's Prometheus endpoint."""
    block_size_tokens: int
    num_kv_blocks: int
    bytes_per_block: int
    """KV bytes of a block, over all GPUs of the worker."""
    max_num_seqs: int
    max_num_batched_tokens: int
    load: WorkerLoad = field(default_factory=WorkerLoad)
    heartbeat: int = 0
    """Which heartbeat this is since the engine's start: a report may be seen more than once."""
    steps: tuple[StepObservation, ...] = ()
    """A few of the steps since the heartbeat before, all in ``role``."""
    trouble: str = ""
    """Why it is quarantined: there, draining, to be given nothing new. Empty for a worker that is well."""

    @property
    def kv_capacity_tokens(self) -> int:
        return self.block_size_tokens * self.num_kv_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """The registry's answer to a heartbeat."""

    role: Role
    draining: bool = False
    quarantined: str = ""
    """Why it is to give back what it has and be replaced; empty for a worker that is well."""
    peers: tuple[KvPeer, ...] = ()
    """Workers of the same model whose KV this worker may pull: connect before the first handoff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPeer:
    """Where another worker's lease service answers, and which engine start it is."""

    incarnation: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspectNode:
    """A node on which workers of a shape keep dying."""

    shape: str
    node_id: str
    num_deaths: int
    """Lately, starts that failed among them."""
    last_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The cluster as the registry sees it.

    ``(incarnation, epoch)`` names the membership: epochs grow within one registry incarnation, and
    only changes of members, roles or draining make a new one. Loads are as fresh as the heartbeats.
    """

    incarnation: str
    epoch: int
    workers: tuple[WorkerReport, ...] = ()
    num_routers: int = 1
    """Routers that have asked for a snapshot lately."""
    suspect_nodes: tuple[SuspectNode, ...] = ()
    """No part of the membership: a change of them alone makes no new epoch."""
