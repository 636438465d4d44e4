"""The plots of a run's report, each as SVG text: bucketed, so that their size does not grow with the run.

All plots over time share one time axis and one set of margins, so that they line up on the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from simulator.reports.decisions import moves
from simulator.reports.drawing import (
    BLUE,
    GREEN,
    GREY,
    MAX_SAMPLES,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SKY,
    STYLE,
    TimeAxis,
    bucket_percentiles_ms,
    bucket_sums,
    count_axis,
    figure,
    latency_scale,
    legend,
    plain_log_labels,
    thinned,
    time_axis,
)
from simulator.reports.summary import MINUTE_S, slo_met
from simulator.result import Floats, Outcome, SimulationResult, Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot with its words."""

    title: str
    caption: str
    svg: str


def draw_plots(result: SimulationResult, slo: Slo, worst_minute_start_s: float | None) -> list[Plot]:
    """All plots of the report, in order of reading. Values that do not exist leave an empty plot."""
    time = time_axis(result)
    with matplotlib.style.context(["default", STYLE]):
        return [
            _attainment(result, slo, time, worst_minute_start_s),
            _arrivals(result, slo, time),
            _latency(result, time, "TTFT", result.requests.ttft_s, slo.ttft_s),
            _latency(result, time, "TPOT", result.requests.tpot_s, slo.tpot_s),
            _workers(result, time),
            _prompt_tokens(result, time),
            _waiting_tokens(result, time),
            _queues(result, time),
            _kv_use(result, time),
            _distributions(result, slo),
        ]


# ----------------------------------------------------------------------------------------- over time


def _attainment(result: SimulationResult, slo: Slo, time: TimeAxis, worst_start_s: float | None) -> Plot:
    arrival_s = result.requests.arrival_s
    ttft_met, tpot_met = slo_met(result.requests, slo)
    bucket_s = time.bucket_s(480, least_s=MINUTE_S)
    edges_s, num_requests = bucket_sums(arrival_s, np.ones(len(arrival_s)), bucket_s, time.end_s)
    _, num_met = bucket_sums(arrival_s, ttft_met & tpot_met, bucket_s, time.end_s)
    with np.errstate(invalid="ignore"):
        share = num_met / num_requests
    with figure() as (axes, to_svg):
        left, width = edges_s[:-1] / time.unit_s, bucket_s / time.unit_s
        # The missed part shows too: a minute of only misses is not a minute without requests.
        for height, label, colour in ((num_requests > 0, "missed SLO", PALE), (share, "met SLO", BLUE)):
            axes.bar(left, height, width * 0.92, align="edge", color=colour, linewidth=0, label=label)
        if worst_start_s is not None:
            worst = left[int(worst_start_s // bucket_s)] + width / 2
            axes.plot(worst, 1.0, "v", color=RED, markersize=8, clip_on=False, zorder=5, label="worst minute")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        time.dress(axes)
        legend(axes)
        every = "minute" if bucket_s == MINUTE_S else f"{bucket_s / MINUTE_S:g} minutes"
        return Plot(
            title=f"Attainment per {every}",
            caption="Share of the requests that arrived then and met both targets",
            svg=to_svg(),
        )


def _arrivals(result: SimulationResult, slo: Slo, time: TimeAxis) -> Plot:
    requests = result.requests
    ttft_met, tpot_met = slo_met(requests, slo)
    met, done = ttft_met & tpot_met, requests.outcome == Outcome.DONE
    bucket_s = time.bucket_s(240)
    with figure() as (axes, to_svg):
        base: Any = 0.0
        for chosen, label, colour in (
            (met, "met SLO", BLUE),
            (done & ~met, "missed SLO", ORANGE),
            (~done, "rejected or failed", RED),
        ):
            edges_s, counts = bucket_sums(requests.arrival_s, chosen, bucket_s, time.end_s)
            top = base + counts / bucket_s
            if counts.any():
                axes.stairs(
                    top,
                    edges_s / time.unit_s,
                    baseline=base,
                    fill=True,
                    color=colour,
                    label=label,
                    alpha=0.85,
                )
            base = top
        axes.set_ylim(bottom=0)
        time.dress(axes)
        legend(axes)
        return Plot(
            title="Arrivals per second",
            caption=f"By what became of them, mean over {bucket_s:g} s",
            svg=to_svg(),
        )


def _prompt_tokens(result: SimulationResult, time: TimeAxis) -> Plot:
    requests = result.requests
    bucket_s = time.bucket_s(240)
    with figure() as (axes, to_svg):
        for tokens, label, colour in (
            (requests.prompt_tokens, "prompt", SKY),
            (requests.cached_tokens, "of these cached", GREEN),
        ):
            edges_s, sums = bucket_sums(requests.arrival_s, tokens, bucket_s, time.end_s)
            if sums.any():
                axes.stairs(sums / bucket_s, edges_s / time.unit_s, fill=True, color=colour, label=label)
        count_axis(axes)
        time.dress(axes)
        legend(axes)
        return Plot(
            title="Prompt tokens per second",
            caption=f"Tokens of the prompts that arrived, mean over {bucket_s:g} s",
            svg=to_svg(),
        )


def _latency(result: SimulationResult, time: TimeAxis, name: str, values_s: Floats, target_s: float) -> Plot:
    bucket_s = time.bucket_s(120)
    done = (result.requests.outcome == Outcome.DONE) & np.isfinite(values_s)
    middle, p50_ms, p99_ms = bucket_percentiles_ms(
        result.requests.arrival_s[done], values_s[done], bucket_s, time.end_s
    )
    with figure() as (axes, to_svg):
        x = middle / time.unit_s
        marker = "." if np.isfinite(p50_ms).sum() <= 3 else None
        axes.fill_between(x, p50_ms, p99_ms, color=SKY, alpha=0.3, linewidth=0)
        axes.plot(x, p99_ms, color=SKY, label="p99", linewidth=1.2, marker=marker)
        axes.plot(x, p50_ms, color=BLUE, label="p50", linewidth=1.8, marker=marker)
        axes.axhline(target_s * 1e3, color=RED, linestyle="--", linewidth=1.2, label="SLO")
        latency_scale(axes, [*p50_ms[np.isfinite(p50_ms)], *p99_ms[np.isfinite(p99_ms)]], target_s * 1e3)
        time.dress(axes)
        legend(axes)
        return Plot(
            title=f"{name} over time",
            caption=f"Milliseconds, of requests that arrived in the same {bucket_s:g} s",
            svg=to_svg(),
        )


def _workers(result: SimulationResult, time: TimeAxis) -> Plot:
    timeline = result.timeline
    with figure() as (axes, to_svg):
        base: Any = 0.0
        for counts, label, colour in (
            (timeline.num_prefill_workers, "prefill", ORANGE),
            (timeline.num_decode_workers, "decode", BLUE),
            (timeline.num_starting_workers, "starting", GREY),
        ):
            x, heights = thinned(timeline.time_s, counts, np.take)
            top = base + heights
            if heights.any():
                axes.fill_between(
                    x / time.unit_s, base, top, step="post", color=colour, alpha=0.8, linewidth=0, label=label
                )
            base = top
        count_axis(axes)
        axes.set_axisbelow(False)
        time.dress(axes)
        caption = "The split between the roles, stacked"
        if at_s := [decision.at_s for decision in moves(result)]:
            _mark_decisions(axes, time, at_s)
            caption += "; marked: what the planner decided to change"
        legend(axes)
        return Plot(title="Workers", caption=caption, svg=to_svg())


def _mark_decisions(axes: Axes, time: TimeAxis, at_s: list[float]) -> None:
    """Above the bars, where nothing else is drawn."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * 1.12)
    places = sorted({round(each_s / time.end_s * MAX_SAMPLES) / MAX_SAMPLES for each_s in at_s})
    axes.plot(
        [place * time.end_s / time.unit_s for place in places],
        [top * 1.06] * len(places),
        "v",
        color=PURPLE,
        markersize=5,
        label="decision",
    )


def _waiting_tokens(result: SimulationResult, time: TimeAxis) -> Plot:
    timeline = result.timeline
    with figure() as (axes, to_svg):
        x, tokens = thinned(timeline.time_s, timeline.waiting_prefill_tokens, np.maximum.reduceat)
        axes.fill_between(x / time.unit_s, 0, tokens, color=ORANGE, alpha=0.35, linewidth=0)
        axes.plot(x / time.unit_s, tokens, color=ORANGE, linewidth=1.2)
        count_axis(axes)
        time.dress(axes)
        return Plot(
            title="Waiting prefill tokens",
            caption="Prompt tokens without a first token yet, over all workers",
            svg=to_svg(),
        )


def _queues(result: SimulationResult, time: TimeAxis) -> Plot:
    timeline = result.timeline
    with figure() as (axes, to_svg):
        for counts, label, colour in (
            (timeline.num_running, "running", BLUE),
            (timeline.num_waiting, "waiting", ORANGE),
        ):
            x, heights = thinned(timeline.time_s, counts, np.maximum.reduceat)
            axes.plot(x / time.unit_s, heights, color=colour, label=label)
        count_axis(axes)
        time.dress(axes)
        legend(axes)
        return Plot(title="Requests on workers", caption="Running, and queued on workers", svg=to_svg())


def _kv_use(result: SimulationResult, time: TimeAxis) -> Plot:
    timeline = result.timeline
    with figure() as (axes, to_svg):
        x, share = thinned(timeline.time_s, timeline.kv_use, np.maximum.reduceat)
        axes.fill_between(x / time.unit_s, 0, share, color=GREEN, alpha=0.25, linewidth=0)
        axes.plot(x / time.unit_s, share, color=GREEN, linewidth=1.2)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        time.dress(axes)
        return Plot(title="KV use", caption="Share of the decode workers' KV blocks in use", svg=to_svg())


# ------------------------------------------------------------------------------------- distributions


def _distributions(result: SimulationResult, slo: Slo) -> Plot:
    done = result.requests.outcome == Outcome.DONE
    with figure() as (axes, to_svg):
        shown_ms: list[float] = []
        for values_s, target_s, label, colour in (
            (result.requests.tpot_s[done], slo.tpot_s, "TPOT", GREEN),
            (result.requests.ttft_s[done], slo.ttft_s, "TTFT", BLUE),
        ):
            values_ms = np.sort(values_s[np.isfinite(values_s)]) * 1e3
            axes.axvline(target_s * 1e3, color=colour, linestyle="--", linewidth=1.2, label=f"SLO of {label}")
            shown_ms.append(target_s * 1e3)
            if len(values_ms):
                places = np.linspace(0, len(values_ms) - 1, min(len(values_ms), MAX_SAMPLES)).astype(np.int64)
                share = (places + 1) / len(values_ms)
                x, y = [values_ms[0], *values_ms[places]], [0.0, *share]
                axes.plot(x, y, color=colour, drawstyle="steps-post", label=label)
                shown_ms += [values_ms[0], values_ms[-1]]
        positive_ms = [value_ms for value_ms in shown_ms if value_ms > 0]
        axes.set_xscale("log")
        axes.set_xlim(min(positive_ms) * 0.8, max(positive_ms) * 1.25)
        plain_log_labels(axes.xaxis)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("milliseconds")
        legend(axes)
        return Plot(
            title="TTFT and TPOT: share at or below",
            caption="Of the requests answered in full",
            svg=to_svg(),
        )
