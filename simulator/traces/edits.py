"""Parts and variants of a trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from core.errors import ConfigError
from simulator.traces.trace import Trace


def scale_rate(trace: Trace, factor: float) -> Trace:
    """The same requests ``factor`` times as fast: arrival times are divided by it.

    Raises:
        core.errors.ConfigError: ``factor`` is not above 0.
    """
    if not 0 < factor < float("inf"):
        raise ConfigError(f"the rate's factor must be above 0, not {factor}")
    requests = (replace(request, arrival_s=request.arrival_s / factor) for request in trace.requests)
    return replace(trace, requests=tuple(requests))


def head(trace: Trace, *, num_requests: int | None = None, duration_s: float | None = None) -> Trace:
    """The first requests, at most ``num_requests`` and none at or after ``duration_s``.

    Raises:
        core.errors.ConfigError: an argument is negative.
    """
    if (num_requests is not None and num_requests < 0) or (duration_s is not None and not duration_s >= 0):
        raise ConfigError(
            f"the head of a trace must not be negative, but num_requests is {num_requests} and duration_s "
            f"{duration_s}"
        )
    requests = trace.requests if num_requests is None else trace.requests[:num_requests]
    if duration_s is not None:
        requests = tuple(request for request in requests if request.arrival_s < duration_s)
    return replace(trace, requests=requests)


def window(trace: Trace, start_s: float, end_s: float) -> Trace:
    """The requests from ``start_s`` to before ``end_s``; ``start_s`` becomes 0.

    Raises:
        core.errors.ConfigError: the window ends before it starts.
    """
    if not 0 <= start_s <= end_s:
        raise ConfigError(f"a window must run from 0 or later to a later end, not from {start_s} to {end_s}")
    requests = (
        replace(request, arrival_s=request.arrival_s - start_s)
        for request in trace.requests
        if start_s <= request.arrival_s < end_s
    )
    return replace(trace, requests=tuple(requests))


def thin(trace: Trace, keep_share: float, seed: int) -> Trace:
    """Each request with chance ``keep_share``, at its time: a lower rate with the same course of the day.

    Requests go one by one, so that prefixes are shared less than in the whole trace.

    Raises:
        core.errors.ConfigError: ``keep_share`` is not above 0 and at most 1.
    """
    if not 0 < keep_share <= 1:
        raise ConfigError(f"keep_share must be above 0 and at most 1, not {keep_share}")
    keep = np.random.default_rng([seed, 1]).random(len(trace.requests)) < keep_share
    requests = (request for request, kept in zip(trace.requests, keep.tolist(), strict=True) if kept)
    return replace(trace, requests=tuple(requests))
