"""What a simulation run leaves behind: one row a request, gaps between tokens, and the cluster over time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from planner.decision import PlanDecision

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Outcome(StrEnum):
    """How a request ended."""

    DONE = "done"
    REJECTED = "rejected"
    """Refused before any token: no worker would take it."""
    FAILED = "failed"
    """Ended by an error after work had begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Targets of one model."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Demands:
    """Whose requests these are and what they ask for, one row a request."""

    tenant: npt.NDArray[np.str_]
    priority: Ints
    """Lower is more urgent."""
    ttft_slo_s: Floats
    """Its own target; nan: the one for all."""
    tpot_slo_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTable:
    """One row a request, in order of arrival; columns have equal length. Times are virtual seconds.

    ``nan`` where a request has no such time: no first token, or only one token (``tpot_s``).
    """

    arrival_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    """Mean time per output token after the first."""
    e2e_s: Floats
    """From arrival to last token."""
    prompt_tokens: Ints
    output_tokens: Ints
    """Tokens that reached the client."""
    cached_tokens: Ints
    """Prompt tokens that the worker which prefilled it had cached."""
    outcome: npt.NDArray[np.str_]
    """Values of :class:`Outcome`."""
    path: npt.NDArray[np.str_]
    """Values of :class:`core.request.Path`."""
    prefill_queue_s: Floats
    """Time the prompt waited for its first chunk."""
    transfer_s: Floats
    """Time its KV pull took; nan without one."""
    refusal: npt.NDArray[np.str_] | None = None
    """Reasons of :class:`core.errors.Rejected`, empty for the others; None: there are none."""
    demands: Demands | None = None
    """None: all are alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """All gaps between two tokens of a request: ``weight`` gaps of ``gap_s`` each."""

    gap_s: Floats
    weight: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The cluster sampled at regular times; arrays of one length."""

    time_s: Floats
    num_prefill_workers: Ints
    num_decode_workers: Ints
    num_starting_workers: Ints
    waiting_prefill_tokens: Ints
    """Prompt tokens without a first token yet, over all workers."""
    num_waiting: Ints
    """Requests queued on workers."""
    num_running: Ints
    kv_use: Floats
    """Share of all decode workers' KV blocks in use, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """Something that changed the cluster: a role switch, a start, a fault."""

    time_s: float
    kind: str
    """``role_switch``, ``start``, ``stop``, or the name of a fault."""
    worker_id: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """One run."""

    trace_name: str
    requests: RequestTable
    gaps: Gaps
    timeline: Timeline
    events: tuple[ClusterEvent, ...]
    num_role_switches: int
    gpu_seconds: float
    """GPUs held, from start to end of the run, workers that are starting included."""
    simulated_s: float
    """Virtual seconds from the first to the last event."""
    wall_s: float
    """Seconds the simulation itself took; differs between two runs of one seed."""
    extrapolated_share: float
    """Share of computing time in steps outside what the performance profile measured."""
    num_preemptions: int
    num_recomputed: int
    """Handoffs whose KV had to be computed again."""
    decisions: tuple[PlanDecision, ...] = ()
    """Every look of the planner; empty without one."""
    planner_cpu_s: float = 0.0
    """CPU seconds of all its looks, as ``wall_s`` not the same in two runs..."""
    planner_cpu_max_s: float = 0.0
    """...and of the longest one."""
