"""From decisions and traces to switches: who was busy with what, and who was first at the new work."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.planner_live_switches import switches

OFFSET_S = -1000.0
"""The router's clock less the wall clock."""


def move(at_s: float, worker_id: str, role: str, **more: Any) -> dict[str, Any]:
    return {
        "number": 1,
        "at_s": at_s - OFFSET_S,
        "reason": "r",
        "split": "3P+1D",
        "carried_out": True,
        "role_changes": [{"worker_id": worker_id, "role": role}],
        **more,
    }


def trace(
    prefill: str, decode: str, at_s: float, *, queue_s: float = 0.5, decode_s: float = 4.0
) -> dict[str, Any]:
    """Sent at ``at_s``, prefilled for 1 s after ``queue_s``, handed off at once, pulled after 0.5 s."""
    done_s = at_s + queue_s + 1.0
    return {
        "prefill_worker": prefill,
        "decode_worker": decode,
        "prefill_sent_at_s": at_s,
        "prefill_done_at_s": done_s,
        "prefill_s": 1.0,
        "handoff_sent_at_s": done_s,
        "decode_queue_s": 0.5,
        "last_token_at_s": done_s + 0.5 + decode_s,
    }


def test_a_decode_worker_that_prefills() -> None:
    decoding = [trace("p", "w", 1.0), trace("p", "w", 2.0), trace("p", "other", 1.0)]
    prefilled = [trace("w", "d", 10.4), trace("w", "d", 10.2, queue_s=0.7), trace("w", "d", 3.0)]
    (switch,) = switches([move(5.0, "w", "prefill")], [*decoding, *prefilled], OFFSET_S)
    assert (switch.num_running, switch.num_held) == (2, 0)
    assert switch.first is not None
    assert math.isclose(switch.first.done_s, 11.9)  # both end at once; either will do
    (switch,) = switches([move(10.0, "w", "prefill")], prefilled, OFFSET_S)
    assert math.isclose(switch.done_after_s, 1.9)
    assert math.isclose(switch.service_s, 1.0)
    assert math.isclose(switch.delay_s, 0.9)


def test_a_prefill_worker_that_decodes_still_holds_what_is_to_be_pulled() -> None:
    running, held, gone = trace("w", "d", 9.0), trace("w", "d", 8.2), trace("w", "d", 7.0)
    first, later = trace("p", "w", 8.9), trace("p", "w", 9.1, decode_s=1.0)
    (switch,) = switches([move(10.0, "w", "decode")], [running, held, gone, first, later], OFFSET_S)
    assert (switch.num_running, switch.num_held, switch.num_old) == (1, 1, 2)
    assert math.isclose(switch.done_after_s, 2.1)
    assert math.isclose(switch.service_s, 1.0)


def test_what_comes_after_the_next_change_of_the_worker_is_not_the_first_switchs() -> None:
    moves = [move(10.0, "w", "prefill"), move(12.0, "w", "decode"), move(20.0, "w", "prefill")]
    found = switches(moves, [trace("w", "d", 21.0)], OFFSET_S)
    assert [switch.first is None for switch in found] == [True, True, False]
    assert found[0].delay_s == math.inf


def test_what_was_not_carried_out_is_no_switch() -> None:
    moves = [move(10.0, "w", "prefill", carried_out=False), move(11.0, "w", "prefill", role_changes=[])]
    assert switches(moves, [], OFFSET_S) == []
