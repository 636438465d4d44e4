"""A recorded or generated load: when requests arrive, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace."""

    arrival_s: float
    """Seconds after the trace's start."""
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()
    """Names of the full pieces at the front of the prompt, each ``Trace.hash_block_tokens`` long; each
    stands for everything up to its end. Empty: shares nothing with any other request."""
    tenant: str = ""
    """Whose it is."""
    priority: int = 0
    """Lower is more urgent."""
    ttft_slo_s: float | None = None
    """Its own target; None: the cluster's."""
    tpot_slo_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of arrival."""

    name: str
    requests: tuple[TraceRequest, ...]
    hash_block_tokens: int = 512
    """Tokens under one of ``block_hashes``."""

    def __post_init__(self) -> None:
        arrivals_s = [request.arrival_s for request in self.requests]
        if any(later < earlier for earlier, later in pairwise(arrivals_s)):
            raise ValueError(f"trace {self.name!r} is not in order of arrival")

    @property
    def duration_s(self) -> float:
        """From 0 to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0
