"""Tables of finished requests: who ran which leg, how long, how many bytes; and what became of a burst."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from core.request import Leg
from deploy.demo_burst import Burst

Trace = Mapping[str, Any]
"""What a router answers at /baton/requests/ID."""

_LEGS = {
    Leg.ROUTER_QUEUE: ("R", "white"),
    Leg.PREFILL_QUEUE: ("Q", "bright_black"),
    Leg.PREFILL: ("P", "blue"),
    Leg.HANDOFF: ("H", "yellow"),
    Leg.TRANSFER: ("T", "red"),
    Leg.DECODE_QUEUE: ("q", "bright_black"),
    Leg.FIRST_DECODE_STEP: ("F", "cyan"),
    Leg.DECODE: ("D", "green"),
}
"""Letter and colour of each leg in the bar."""
_MAX_BAR_WIDTH = 48
_LEGS_WIDTH = 86
"""Columns of the legs table without its bar."""


def requests_table(requests: Sequence[tuple[str, Trace]]) -> Table:
    """One line for each request.

    Args:
        requests: label and trace.
    """
    table = Table(title="requests: who did what", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("#", justify="right")
    table.add_column("request")
    for heading in ("prompt\ntokens", "answer\ntokens"):
        table.add_column(heading, justify="right")
    for heading in ("path", "prefilled by", "decoded by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("KV over\nNIXL", "TTFT", "TPOT"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (label, trace) in enumerate(requests, start=1):
        table.add_row(
            str(number),
            label,
            str(trace["prompt_tokens"]),
            str(trace["output_tokens"]),
            trace["path"],
            trace["prefill_worker"] or trace["decode_worker"],
            trace["decode_worker"] or "-",
            _megabytes(trace["kv_bytes"]),
            _milliseconds(trace["ttft_s"]),
            _milliseconds(trace["tpot_s"]),
        )
    return table


def legs_table(requests: Sequence[tuple[str, Trace]], width: int) -> Table:
    """Where each request's time went, in numbers and as a bar.

    Args:
        requests: label and trace.
        width: columns there are.
    """
    table = Table(title="time of each leg, in ms", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("#", justify="right")
    for leg, (letter, colour) in _LEGS.items():
        table.add_column(
            leg.value.replace("_", "\n") + f"\n{letter}", justify="right", header_style=f"bold {colour}"
        )
    bar_width = min(_MAX_BAR_WIDTH, width - _LEGS_WIDTH)
    longest_s = max((sum(trace["legs_s"].values()) for _, trace in requests), default=0.0)
    if bar_width >= len(_LEGS):
        table.add_column("start to end")
    for number, (_, trace) in enumerate(requests, start=1):
        legs_s = trace["legs_s"]
        cells = [f"{1000 * legs_s[leg]:.1f}" if leg in legs_s else "-" for leg in _LEGS]
        bar = [_bar(legs_s, bar_width / longest_s)] if bar_width >= len(_LEGS) and longest_s else []
        table.add_row(str(number), *cells, *bar)
    return table


def _bar(legs_s: Mapping[str, float], columns_per_s: float) -> Text:
    bar, end_s = Text(), 0.0
    for leg, (letter, colour) in _LEGS.items():
        end_s += legs_s.get(leg, 0.0)
        bar.append(letter * (round(end_s * columns_per_s) - len(bar)), style=f"bold {colour} reverse")
    return bar


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes else "-"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"


def burst_lines(burst: Burst) -> Iterator[str]:
    """Who changed roles, why, and how requests fared meanwhile."""
    answered = f"{len(burst.traces)} requests in {burst.seconds:.0f} s, all answered"
    if burst.move is None:
        yield f"No worker changed roles within {burst.seconds:.0f} s. The planner: {burst.reason}."
        yield f"{answered}."
        return
    move = burst.move
    for worker_id in sorted(burst.switched):
        yield f"{worker_id} changed from decode to prefill: {burst.reason} (decision {move['number']})."
    yield (
        f"{burst.num_ongoing} requests were on their way and went on; it prefilled {burst.num_served}. "
        f"{answered}."
    )
