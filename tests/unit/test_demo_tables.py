"""The demo's tables of finished requests."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from core.request import Path
from deploy.demo_burst import Burst
from deploy.demo_tables import burst_lines, legs_table, requests_table
from router.trace import RequestTrace

REMOTE = RequestTrace(
    request_id="chatcmpl-1",
    model="tiny",
    adapter="",
    tenant="",
    prompt_tokens=300,
    received_at_s=0.0,
    path=Path.REMOTE_EARLY,
    prefill_worker="cpu-a",
    decode_worker="cpu-b",
    prefill_sent_at_s=0.001,
    prefill_done_at_s=0.041,
    prefill_s=0.039,
    first_token_at_s=0.042,
    handoff_sent_at_s=0.042,
    first_decode_at_s=0.062,
    last_token_at_s=0.142,
    output_tokens=11,
    kv_bytes=3_145_728,
    kv_pull_s=0.005,
).as_dict()
LOCAL = {**REMOTE, "path": "local", "prefill_worker": "", "kv_bytes": 0, "legs_s": {"decode": 0.142}}


def printed(table: Table, width: int = 120) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def row(table: Table, number: int, width: int = 120) -> list[str]:
    return next(line.split() for line in printed(table, width) if line.split()[:1] == [str(number)])


def test_a_request_shows_who_ran_it_and_what_crossed() -> None:
    table = requests_table([("chat", REMOTE), ("two", LOCAL)])
    assert row(table, 1) == [
        "1",
        "chat",
        "300",
        "11",
        "remote_early",
        "cpu-a",
        "cpu-b",
        "3.15",
        "MB",
        "42.0",
        "ms",
        "10.0",
        "ms",
    ]
    assert row(table, 2)[4:8] == ["local", "cpu-b", "cpu-b", "-"]


def test_every_leg_shows_its_time_and_its_share_of_the_bar() -> None:
    cells = row(legs_table([("chat", REMOTE)], 120), 1)
    assert cells[1:9] == ["1.0", "0.0", "39.0", "1.0", "5.0", "0.0", "15.0", "80.0"]
    bar = cells[9]
    assert "".join(dict.fromkeys(bar)) == "PTFD"
    assert bar.count("D") > bar.count("P") > bar.count("F") > bar.count("T")


def test_bars_of_different_requests_have_one_scale() -> None:
    half: dict[str, Any] = {**LOCAL, "legs_s": {"decode": REMOTE["legs_s"]["decode"] / 2}}
    table = legs_table([("chat", {**LOCAL, "legs_s": {"decode": 0.08}}), ("chat", half)], 120)
    assert len(row(table, 1)[9]) == 2 * len(row(table, 2)[9])


def test_a_narrow_terminal_gets_numbers_without_bars() -> None:
    assert len(row(legs_table([("chat", REMOTE)], 80), 1, 80)) == 9


def test_a_burst_says_who_changed_roles_and_why_and_that_requests_went_on() -> None:
    move = {
        "number": 31,
        "role_changes": [
            {"worker_id": "cpu-c", "role": "prefill"},
            {"worker_id": "cpu-d", "role": "decode"},
        ],
    }
    burst = Burst(
        traces=(REMOTE, {**REMOTE, "prefill_worker": "cpu-c"}),
        seconds=6.2,
        move=move,
        reason="3P+1D would gain 20.0% of the requests",
        num_ongoing=9,
    )
    assert list(burst_lines(burst)) == [
        "cpu-c changed from decode to prefill: 3P+1D would gain 20.0% of the requests (decision 31).",
        "9 requests were on their way and went on; it prefilled 1. 2 requests in 6 s, all answered.",
    ]


def test_a_burst_without_a_switch_says_so() -> None:
    burst = Burst(traces=(REMOTE,), seconds=40.0, move=None, reason="the split is the best there is")
    assert list(burst_lines(burst)) == [
        "No worker changed roles within 40 s. The planner: the split is the best there is.",
        "1 requests in 40 s, all answered.",
    ]
