"""What `baton simulate` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "end to end"}
_COLUMNS = ("mean", "p50", "p90", "p99", "max")


def verdict(summary: Mapping[str, Any]) -> str:
    """The run in three lines."""
    slo, settings = summary["slo"], summary["settings"]
    split = ", ".join(
        f"{count} {role} ({settings['profiles'][shape]})"
        for shape, roles in settings["workers"].items()
        for role, count in roles.items()
        if count
    )
    ends = (
        f"{summary['num_done']:,} done, {summary['num_rejected']:,} rejected, "
        f"{summary['num_failed']:,} failed"
    )
    return (
        f"{summary['num_requests']:,} requests ({ends}) on {split}\n"
        f"[bold]attainment {summary['attainment']:.2%}[/] of TTFT <= {slo['ttft_ms']:g} ms and "
        f"TPOT <= {slo['tpot_ms']:g} ms; goodput {summary['goodput_rps']:.2f} requests/s, "
        f"{summary['gpu_hours']:.2f} GPU hours\n"
        f"cached {_percent(summary['cached_share'])} of prompt tokens, "
        f"{summary['role_switches']} role switches, {summary['preemptions']} preemptions, "
        f"{summary['recomputed']} handoffs recomputed, "
        f"{_percent(summary['extrapolated_share'])} of computing time outside the measured profile"
    )


def latency_table(summary: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("ms")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for key, name in _LATENCIES.items():
        table.add_row(name, *[_number(summary[key][column]) for column in _COLUMNS])
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
