"""The fault matrix: break the cluster under load, then look at every answer, block and process."""

from __future__ import annotations

import dataclasses

import pytest

from tests.faults import injections as inject
from tests.faults.cluster import FaultCluster
from tests.faults.configuration import PREFILL_TIMEOUT_S, STALL_TIMEOUT_S
from tests.faults.record import FaultReport
from tests.faults.references import LONG_ANSWER, LONG_PROMPT, MIXED, References
from tests.faults.row import Expect, LoadSpec, Row, run_row

PROMPTS = LoadSpec(kinds=(LONG_PROMPT,), clients=8)
STREAMS = LoadSpec(kinds=(LONG_ANSWER,), clients=8)

ROWS = (
    Row(
        1,
        "a prefill worker dies while it prefills",
        inject.kill_prefill_worker_while_prefilling,
        Expect(),
        PROMPTS,
    ),
    Row(
        2,
        "a prefill worker dies before the pull",
        inject.kill_prefill_worker_before_the_pull,
        Expect(),
        PROMPTS,
    ),
    Row(
        3,
        "a decode worker dies before its first token",
        inject.kill_decode_worker_before_its_first_token,
        Expect(),
        PROMPTS,
    ),
    Row(
        4,
        "a decode worker dies in mid-stream",
        inject.kill_decode_worker_mid_stream,
        Expect(counts={"baton_retries_total": {"how": "continued"}}),
        STREAMS,
    ),
    Row(
        5,
        "all prefill workers die",
        inject.kill_all_prefill_workers,
        Expect(counts={"baton_prefill_fallbacks_total": {"reason": "no_prefill_worker"}}),
        LoadSpec(kinds=(LONG_PROMPT, MIXED)),
    ),
    Row(
        7,
        "an engine dies, its replica lives",
        inject.kill_engine_core,
        Expect(out_within_s=1.5),
        STREAMS,
    ),
    Row(
        8,
        "a prefill worker hangs",
        inject.stop_prefill_worker_while_prefilling,
        Expect(max_silence_s=PREFILL_TIMEOUT_S + 8),
        LoadSpec(kinds=(LONG_PROMPT,), clients=5),  # no more than the others can take in time
        hold_s=9,
    ),
    Row(
        8,
        "a decode worker hangs in mid-stream",
        inject.stop_decode_worker_mid_stream,
        Expect(max_silence_s=STALL_TIMEOUT_S + 8),
        STREAMS,
        hold_s=9,
    ),
    Row(
        8,
        "an engine hangs in mid-stream, its replica does not",
        inject.stop_engine_core_mid_stream,
        Expect(max_silence_s=STALL_TIMEOUT_S + 8),
        STREAMS,
        hold_s=9,
    ),
    Row(
        12,
        "every worker changes its role and back",
        inject.switch_every_role_back_and_forth,
        Expect(),
        slow=False,
    ),
    Row(13, "a worker less, a worker more", inject.scale_down, Expect(), STREAMS),
    Row(14, "the planner is dead for 30 s", inject.hold_planner_down, Expect(), hold_s=30),
    Row(
        14,
        "planner and registry are dead, a router dies meanwhile",
        inject.hold_planner_and_registry_down_and_kill_a_router,
        Expect(max_errors=6, max_silence_s=5),
        hold_s=15,
    ),
    Row(
        14,
        "the registry stands still for 6 s",
        inject.stop_registry,
        Expect(still={"baton_registry_dropped_workers_total": {}}),
        hold_s=6,
    ),
    Row(22, "the Serve controller dies", inject.kill_serve_controller, Expect(), hold_s=10, slow=False),
)


def _named(row: Row) -> object:
    marks = [pytest.mark.fault_row(row.number), *([pytest.mark.slow] if row.slow else [])]
    return pytest.param(row, id=f"row{row.number}-{row.what.replace(' ', '-')}", marks=marks)


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("row", [_named(row) for row in ROWS])
async def test_row(
    row: Row, broken_cluster: FaultCluster, references: References, fault_report: FaultReport
) -> None:
    result, troubles = await run_row(row, broken_cluster, references)
    print(row.what, dataclasses.asdict(result))
    fault_report.record(row=row.number, what=row.what, **dataclasses.asdict(result))
    assert not troubles, "\n".join(troubles)
