"""The report of a simulation run: one HTML file that needs neither network nor script."""

from __future__ import annotations

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from simulator.reports.decisions import alternatives_text, gains, moves, what_changed
from simulator.reports.drawing import EVENT_STYLES, event_kind
from simulator.reports.plots import draw_plots
from simulator.result import SimulationResult, Slo

_TEMPLATE = Path(__file__).with_name("template.html")
_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "End to end"}
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
_EVENT_WORDS = {"role_switch": "role switch", "start": "worker start", "stop": "worker stop"}
_NO_VALUE = "\u2013"
_MAX_FAULTS_LISTED = 12
_MAX_MOVES_LISTED = 40
_NOTABLE_EXTRAPOLATED_SHARE = 0.05
"""Above this share of computing time outside the profile the reader is warned."""


def render_report(result: SimulationResult, summary: Mapping[str, Any], slo: Slo, *, title: str) -> str:
    """The report as HTML text; the same run gives the same text.

    Args:
        summary: what :func:`simulator.reports.summary.summarize` made of ``result`` and ``slo``.
        title: the page's title.

    Raises:
        core.errors.ConfigError: an SLO target is not a positive number.
    """
    worst = summary["worst_minute"]
    plots = draw_plots(result, slo, worst["start_s"] if worst else None)
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True)
    environment.filters.update(number=number, percent=percent, target=target)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        trace_name=result.trace_name,
        summary=summary,
        num_gpus=result.gpu_seconds / result.simulated_s if result.simulated_s else None,
        duration=_duration(result.simulated_s),
        worst_start=_clock(worst["start_s"]) if worst else None,
        warnings=_warnings(summary),
        plots=[
            {"title": plot.title, "caption": plot.caption, "data": b64encode(plot.svg.encode()).decode()}
            for plot in plots
        ],
        event_legend=_event_legend(result),
        latencies=[
            {
                "name": name,
                "values": [summary[key][column] for column in _COLUMNS],
                "slo": summary["slo"].get(key),
            }
            for key, name in _LATENCIES.items()
        ],
        columns=_COLUMNS,
        faults=_faults(result),
        planner=_planner(result, summary),
        settings={name: _setting(value) for name, value in summary["settings"].items()},
    )


def number(value: float | None) -> str:
    """Three significant digits, all digits before the point; a dash for None."""
    if value is None:
        return _NO_VALUE
    magnitude = abs(value)
    if isinstance(value, int) or magnitude >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def target(milliseconds: float) -> str:
    """A target as people say it: 50 ms, 2 s."""
    return f"{milliseconds / 1e3:g}\u00a0s" if milliseconds >= 1000 else f"{milliseconds:g}\u00a0ms"


def percent(share: float | None) -> str:
    """A share as a percentage that says 100 or 0 only where all or none is meant."""
    if share is None:
        return _NO_VALUE
    if 0 < share < 1:
        share = min(max(share, 0.001), 0.999)
        return f"{share * 100:.1f}%"
    return f"{share * 100:.0f}%"


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    warnings = []
    if not summary["num_requests"]:
        warnings.append("The trace holds no requests.")
    if (share := summary["extrapolated_share"] or 0.0) > _NOTABLE_EXTRAPOLATED_SHARE:
        warnings.append(
            f"{percent(share)} of the computing time lies outside what the performance profile measured: "
            "figures there are extrapolated."
        )
    return warnings


def _event_legend(result: SimulationResult) -> list[dict[str, Any]]:
    """Each kind of event that occurred, with the style of its marks, in the order of ``EVENT_STYLES``."""
    order = list(EVENT_STYLES)
    counts = Counter((order.index(event_kind(event)), event.kind) for event in result.events)
    return [
        {
            "name": _EVENT_WORDS.get(name, name.replace("_", " ")),
            "count": count,
            "colour": EVENT_STYLES[order[rank]][0],
            "line": "solid" if EVENT_STYLES[order[rank]][1] == "-" else "dotted",
        }
        for (rank, name), count in sorted(counts.items())
    ]


def _faults(result: SimulationResult) -> dict[str, Any]:
    faults = [event for event in result.events if event_kind(event) == "fault"]
    rows = [
        {
            "time": _clock(event.time_s),
            "kind": event.kind.replace("_", " "),
            "worker_id": event.worker_id,
            "detail": event.detail,
        }
        for event in faults[:_MAX_FAULTS_LISTED]
    ]
    return {"rows": rows, "num_more": len(faults) - len(rows)}


def _planner(result: SimulationResult, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the planner decided; None if there was none."""
    if not result.decisions:
        return None
    made = moves(result)
    gained = gains(result.decisions)
    rows = [
        {
            "time": _clock(decision.at_s),
            "changes": what_changed(decision),
            "split": decision.split,
            "reason": decision.reason,
            "gain": gained[decision.number],
            "alternatives": alternatives_text(decision.alternatives),
        }
        for decision in made[:_MAX_MOVES_LISTED]
    ]
    return {**summary["planner"], "rows": rows, "num_more": len(made) - len(rows)}


def _clock(time_s: float) -> str:
    """Time since the trace's start, as h:mm:ss."""
    seconds = int(time_s)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _duration(seconds: float) -> str:
    for size_s, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{number(seconds / size_s)} {unit}"
    return f"{number(float(seconds))} s"


def _setting(value: Any) -> str:
    if value is None:
        return _NO_VALUE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
