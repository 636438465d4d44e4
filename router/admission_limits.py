"""What admission control goes by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Limits of one router's waiting line.

    Raises:
        core.errors.ConfigError: a limit is out of its range.
    """

    dispatch_ahead_s: float = 0.1
    """A request is sent once its prefill worker will have finished what is in front of it in this time:
    enough that the worker never idles, little enough that the line's order rules."""
    tpot_share: float = 0.95
    """A decode worker has room while its predicted TPOT stays within this share of the target."""
    kv_share: float = 0.95
    """...and while prompts fill no more than this share of its KV."""
    max_queue_requests: int = 1024
    """Requests that wait at most; 0: nobody waits."""
    max_wait_s: float = 60.0
    """A request that has waited this long is refused."""
    early_rejection: bool = True
    """Refuse at once what will not meet its TTFT target; otherwise it waits up to ``max_wait_s``."""
    reject_above: float = 1.0
    """A predicted TTFT above this many times the target is too late."""
    aging_s: float = 5.0
    """A waiting request moves up one priority class every so often."""
    fair_quantum_s: float = 0.05
    """How much more work than the least served tenant's another's may be before its requests stand back: what
    the line drains in this time."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of tenants in relation to each other; 1 for those not named."""
    max_priority: int = 10
    """Priorities beyond plus or minus this are taken as this."""

    def __post_init__(self) -> None:
        for name in ("dispatch_ahead_s", "max_wait_s", "reject_above", "aging_s", "fair_quantum_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number above 0, not {getattr(self, name)}")
        for name in ("tpot_share", "kv_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, not {getattr(self, name)}")
        for name in ("max_queue_requests", "max_priority"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        for tenant, weight in self.tenant_weights.items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"tenant_weights.{tenant} must be a number above 0, not {weight}")
