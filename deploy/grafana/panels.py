"""What a dashboard is made of: rows of panels of Prometheus queries. Plain data, no Grafana in it."""

from __future__ import annotations

from dataclasses import dataclass

REQUESTS = 'model=~"$model", tenant=~"$tenant"'
"""Selects metrics of requests (routers)."""
MODEL = 'model=~"$model"'
"""Selects metrics of workers and of the registry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One PromQL expression and the name of its series."""

    expr: str
    legend: str
    dashed: bool = False
    """Draw it as a dashed line of its own: something to compare the others with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel; ``unit`` is a Grafana unit id, ``width`` in 24ths of the page."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    """``timeseries`` or ``stat`` (one number over the dashboard's time range)."""
    stacked: bool = False
    width: int = 8
    max_value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A titled group of panels."""

    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, selector: str, window: str = "$__rate_interval") -> str:
    """Increase per second of a counter."""
    return f"rate({metric}{{{selector}}}[{window}])"
