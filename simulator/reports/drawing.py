"""What the report's plots share: palette, time axis, margins, buckets and number formats."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from simulator.reports.summary import weighted_percentiles
from simulator.result import ClusterEvent, Floats, SimulationResult

BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#aa4499"
"""Okabe and Ito's palette, with Tol's purple: told apart by colour-blind eyes too."""
GREY, PALE, INK = "#9aa3ad", "#f6dcae", "#1f2933"
EVENT_STYLES = {"role_switch": (PURPLE, ":"), "start": (GREY, ":"), "stop": (GREY, "-."), "fault": (RED, "-")}
"""Colour and line of the marks of each kind of event; every other kind is a fault."""

MAX_SAMPLES = 400
"""Most points of one line."""

_SIZE_IN = (6.4, 2.5)
_NICE_BUCKETS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
STYLE: dict[str, Any] = {
    "svg.hashsalt": "baton",
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c5ccd3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "grid.linewidth": 0.7,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.solid_joinstyle": "round",
    "figure.facecolor": "white",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeAxis:
    """The time span of all plots, its unit, and the events marked on it."""

    end_s: float
    unit_s: float
    unit: str
    events: tuple[ClusterEvent, ...]

    def bucket_s(self, max_buckets: int, least_s: float = 1.0) -> float:
        """The narrowest nice bucket, at least ``least_s`` wide, that cuts the span into ``max_buckets``."""
        wide_s = max(self.end_s / max_buckets, least_s)
        return next((float(nice_s) for nice_s in _NICE_BUCKETS_S if nice_s >= wide_s), wide_s)

    def dress(self, axes: Axes) -> None:
        """Limits, label and event marks."""
        axes.set_xlim(0, self.end_s / self.unit_s)
        axes.set_xlabel(f"time ({self.unit})")
        # Marks closer than a pixel or two are one mark.
        marks = {(event_kind(event), round(event.time_s / self.end_s * 500)) for event in self.events}
        for kind, place in sorted(marks):
            colour, line = EVENT_STYLES[kind]
            axes.axvline(
                place / 500 * self.end_s / self.unit_s, color=colour, linestyle=line, linewidth=1.3, alpha=0.9
            )


def time_axis(result: SimulationResult) -> TimeAxis:
    """From 0 to the end of the run, at least a second, in the unit that reads best."""
    ends_s = [result.simulated_s, *result.timeline.time_s[-1:], *result.requests.arrival_s[-1:]]
    end_s = max(1.0, *(float(end_s) for end_s in ends_s))
    units = ((180, 1, "seconds"), (10800, 60, "minutes"), (259200, 3600, "hours"), (np.inf, 86400, "days"))
    unit_s, unit = next((size_s, name) for most_s, size_s, name in units if end_s <= most_s)
    return TimeAxis(end_s=end_s, unit_s=unit_s, unit=unit, events=result.events)


def event_kind(event: ClusterEvent) -> str:
    """The key of ``EVENT_STYLES``."""
    return event.kind if event.kind in EVENT_STYLES else "fault"


# ------------------------------------------------------------------------------------------- drawing


@contextmanager
def figure() -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes with the margins of all plots, and what turns them into SVG text."""
    whole = Figure(figsize=_SIZE_IN)
    canvas = FigureCanvasSVG(whole)
    axes = whole.add_axes((0.085, 0.17, 0.895, 0.72))

    def to_svg() -> str:
        text = io.StringIO()
        canvas.print_figure(text, format="svg", metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        # The reader's own interface font; DejaVu, which matplotlib measured with, is wider than any.
        return svg.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans'")

    yield axes, to_svg


def legend(axes: Axes) -> None:
    """One row above the plot, at its right end; none if nothing is labelled."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower right",
            bbox_to_anchor=(1.01, 0.97),
            ncols=len(labels),
            columnspacing=1.2,
            handlelength=1.4,
        )


def count_axis(axes: Axes) -> None:
    """From 0, whole numbers, thousands as k."""
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def latency_scale(axes: Axes, values_ms: list[float], target_ms: float) -> None:
    """Logarithmic when values or target span more than a factor of ten, else linear from 0."""
    shown_ms = [value_ms for value_ms in [*values_ms, target_ms] if value_ms > 0]
    if min(shown_ms) * 10 < max(shown_ms):
        axes.set_yscale("log")
        axes.set_ylim(min(shown_ms) * 0.7, max(shown_ms) * 1.4)
        plain_log_labels(axes.yaxis)
    else:
        axes.set_ylim(0, max(shown_ms) * 1.15)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def plain_log_labels(axis: Any) -> None:
    """1, 2, 5, 10, 20... written as such, not as powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.set_minor_formatter(NullFormatter())


def short_number(value: float) -> str:
    """1500 as 1.5k, 2e6 as 2M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


# ------------------------------------------------------------------------------------------- buckets


def bucket_sums(
    time_s: Floats, values: npt.NDArray[Any], bucket_s: float, end_s: float
) -> tuple[Floats, Floats]:
    """Edges of the buckets from 0 to ``end_s``, and the sum of ``values`` in each."""
    num_buckets = int(end_s // bucket_s) + 1
    bucket = (time_s // bucket_s).astype(np.int64)
    sums = np.bincount(bucket, weights=values.astype(np.float64), minlength=num_buckets)
    return np.arange(num_buckets + 1, dtype=np.float64) * bucket_s, sums.astype(np.float64)


def bucket_percentiles_ms(
    time_s: Floats, values_s: Floats, bucket_s: float, end_s: float
) -> tuple[Floats, Floats, Floats]:
    """Middles of the buckets, p50 and p99 of the values in each; nan in empty ones. In order of time."""
    edges_s = np.arange(int(end_s // bucket_s) + 2, dtype=np.float64) * bucket_s
    ends = np.searchsorted(time_s, edges_s)
    rows = []
    for first, last in pairwise(ends):
        values = values_s[first:last]
        pair = weighted_percentiles(values, np.ones(len(values), dtype=np.int64), (50, 99))
        rows.append(pair or [np.nan, np.nan])
    p50_ms, p99_ms = np.array(rows, dtype=np.float64).T * 1e3
    return edges_s[:-1] + bucket_s / 2, p50_ms, p99_ms


def thinned(
    time_s: Floats, values: npt.NDArray[Any], reduce: Callable[..., npt.NDArray[Any]]
) -> tuple[Floats, npt.NDArray[Any]]:
    """At most ``MAX_SAMPLES`` samples: runs of them reduced to one (peaks stay), or the first taken."""
    if len(time_s) <= MAX_SAMPLES:
        return time_s, values
    starts = np.linspace(0, len(time_s), MAX_SAMPLES, endpoint=False).astype(np.int64)
    return time_s[starts], reduce(values, starts)
