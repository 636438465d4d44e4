"""The words for a request's way through the cluster."""

from __future__ import annotations

from enum import StrEnum


class Path(StrEnum):
    """Which way a request went."""

    REMOTE_EARLY = "remote_early"
    """Prefilled on a prefill worker, whose token was sent to the client at once; a decode worker went on."""
    REMOTE = "remote"
    """Prefilled on a prefill worker, every token from the decode worker."""
    LOCAL = "local"
    """Prefilled and decoded on one decode worker."""
    PREFILL_ONLY = "prefill_only"
    """The answer is one token long: a prefill worker gave it."""
    NONE = "none"
    """No worker ever had it."""


class Leg(StrEnum):
    """The stretches of a request's life, in order."""

    ROUTER_QUEUE = "router_queue"
    PREFILL_QUEUE = "prefill_queue"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    TRANSFER = "transfer"
    DECODE_QUEUE = "decode_queue"
    FIRST_DECODE_STEP = "first_decode_step"
    DECODE = "decode"
