"""The planner's loop: what it carries out, what it survives, what it remembers and shows."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from core.clock import ManualClock, MonotonicClock
from core.observed_steps import StepObservation
from core.performance_model import LinearStepTime
from core.step_times import StepTimes
from core.types import Role
from planner.decision import Alternative, PlanDecision, RoleChange, Verdict
from planner.history import History, PastDecision
from planner.instruments import Instruments
from planner.loop import PlannerLoop
from planner.mode import Mode
from planner.observation import Observation, ObservedWorker
from planner.settings import PlannedShape, PlannerSettings
from telemetry.planner_metrics import PlannerMetrics
from tests.unit.test_registry import report

SETTINGS = PlannerSettings(
    shapes=(
        PlannedShape(
            name="s",
            allowed_roles=frozenset(Role),
            gpus_per_worker=1.0,
            min_workers=3,
            max_workers=3,
            startup_s=60.0,
        ),
    ),
    ttft_slo_s=1.0,
    tpot_slo_s=0.1,
)
STEP_TIME = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.02,
    prefill_base_ms=2.0,
    decode_base_ms=2.0,
    decode_ms_per_seq=0.0,
    decode_ms_per_kv_token=0.0,
)
MOVE = PlanDecision(
    number=7,
    at_s=1.0,
    verdict=Verdict.MOVE,
    reason="more prompts",
    split="2P+1D",
    role_changes=(RoleChange(worker_id="2", shape="s", role=Role.PREFILL),),
    counts={"s": 4},
    inputs={"rate_rps": 3.5},
    alternatives=(
        Alternative(split="2P+1D", num_gpus=3.0, attainment=0.97, score=3.4),
        Alternative(split="1P+2D", num_gpus=3.0, attainment=0.61, score=2.1),
    ),
)
HOLD = replace(MOVE, verdict=Verdict.HOLD, reason="good as it is", role_changes=(), counts={})


def observation() -> Observation:
    roles = {"1": Role.PREFILL, "2": Role.DECODE, "3": Role.DECODE}
    return Observation(
        workers=tuple(
            ObservedWorker(report=report(worker_id, role=role, role_assigned=True), desired_role=role)
            for worker_id, role in roles.items()
        ),
        routers=(),
    )


class Cluster:
    """A registry as the loop sees it: answers, refuses or hangs."""

    def __init__(self) -> None:
        self.assigned: dict[str, Role] = {}
        self.refuses: set[str] = set()
        self.gone: Exception | None = None
        self.hangs = False

    async def observe(self) -> Observation:
        if self.hangs:
            await asyncio.Event().wait()
        if self.gone is not None:
            raise self.gone
        return observation()

    async def assign_role(self, worker_id: str, role: Role) -> None:
        if worker_id in self.refuses:
            raise ValueError(f"Traceback of the other side\nno worker {worker_id!r} in the cluster")
        self.assigned[worker_id] = role


class Workers:
    """A scaler that does as it is asked."""

    def __init__(self) -> None:
        self.num = {"s": 3}
        self.gone = False

    async def wanted(self) -> Mapping[str, int]:
        if self.gone:
            raise ConnectionError("the controller is gone")
        return dict(self.num)

    async def ask(self, shape: str, num_workers: int) -> None:
        self.num[shape] = num_workers


class Script:
    """A planner that decides as it is told, the last thing for ever."""

    def __init__(self, *decisions: PlanDecision | Exception) -> None:
        self.decisions = list(decisions)
        self.seen: list[Observation] = []

    def step(self, observation: Observation) -> PlanDecision:
        self.seen.append(observation)
        decision = self.decisions.pop(0) if len(self.decisions) > 1 else self.decisions[0]
        if isinstance(decision, Exception):
            raise decision
        return replace(decision, number=len(self.seen))


class Bench:
    """A loop with all its parts at hand."""

    def __init__(self, *decisions: PlanDecision | Exception, mode: Mode = Mode.AUTO, **changes: Any) -> None:
        self.cluster, self.workers, self.script = Cluster(), Workers(), Script(*decisions)
        self.clock = ManualClock()
        self.registry = CollectorRegistry()
        metrics = PlannerMetrics(self.registry, model="m", mode=mode)
        self.step_times = StepTimes({"s": STEP_TIME}.get)
        self.loop = PlannerLoop(
            self.script,
            self.cluster,
            changes.pop("scaler", self.workers),
            Instruments(metrics, SETTINGS, self.step_times, self.clock),
            changes.pop("clock", self.clock),
            mode=mode,
            **{"interval_s": 1.0, "call_timeout_s": 0.05, "wall_clock": lambda: 1000.0} | changes,
        )

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"baton_planner_{name}", {"model": "m", **labels})

    @property
    def last(self) -> PastDecision:
        (past,) = self.loop.history.last(1)
        return past


async def test_auto_carries_out_roles_and_counts() -> None:
    bench = Bench(MOVE)
    await bench.loop.look()
    assert bench.cluster.assigned == {"2": Role.PREFILL}
    assert bench.workers.num == {"s": 4}
    assert bench.last.carried_out
    assert bench.last.at_s == 1000.0
    assert bench.value("role_changes_total", from_role="decode", to_role="prefill") == 1
    assert bench.value("decisions_total", verdict="move") == 1


async def test_a_decisions_time_is_when_it_was_made_not_when_it_was_done() -> None:
    now_s = 1000.0
    bench = Bench(MOVE, wall_clock=lambda: now_s)
    assign_role = bench.cluster.assign_role

    async def slowly(worker_id: str, role: Role) -> None:
        nonlocal now_s
        now_s += 2.0
        await assign_role(worker_id, role)

    bench.cluster.assign_role = slowly  # type: ignore[method-assign]
    await bench.loop.look()
    assert bench.last.at_s == 1000.0
    assert now_s == 1002.0


async def test_advise_changes_nothing_and_remembers_what_it_would_have_done() -> None:
    bench = Bench(MOVE, mode=Mode.ADVISE)
    await bench.loop.look()
    assert bench.cluster.assigned == {}
    assert bench.workers.num == {"s": 3}
    assert bench.last.decision.role_changes == MOVE.role_changes
    assert not bench.last.carried_out
    assert bench.value("mode", mode="advise") == 1
    assert bench.value("role_changes_total", from_role="decode", to_role="prefill") == 0


async def test_without_a_scaler_counts_stay() -> None:
    bench = Bench(MOVE, scaler=None)
    await bench.loop.look()
    assert bench.cluster.assigned == {"2": Role.PREFILL}
    assert bench.workers.num == {"s": 3}
    assert bench.script.seen[0].wanted == {}


async def test_the_planner_is_told_which_workers_were_asked_for() -> None:
    bench = Bench(HOLD)
    bench.workers.num = {"s": 5}
    await bench.loop.look()
    bench.workers.gone = True  # roles do not wait for who counts workers
    await bench.loop.look()
    assert [seen.wanted for seen in bench.script.seen] == [{"s": 5}, {"s": 5}]
    assert bench.value("failures_total", doing="scale") == 1


async def test_a_move_that_fails_is_told_and_the_others_are_made() -> None:
    other = RoleChange(worker_id="3", shape="s", role=Role.PREFILL)
    bench = Bench(replace(MOVE, role_changes=(*MOVE.role_changes, other)))
    bench.cluster.refuses = {"2"}
    await bench.loop.look()
    assert bench.cluster.assigned == {"3": Role.PREFILL}
    assert bench.workers.num == {"s": 4}
    assert bench.last.failures == ("2 to prefill: no worker '2' in the cluster",)
    assert not bench.last.carried_out
    assert bench.value("failures_total", doing="switch") == 1


@pytest.mark.parametrize("trouble", ["gone", "hangs"])
async def test_without_the_registry_it_holds_and_says_so_once(
    trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "planner")
    bench = Bench(HOLD)
    bench.cluster.hangs, bench.cluster.gone = trouble == "hangs", ConnectionError("it died")
    for _ in range(3):
        bench.clock.advance(1.0)
        await bench.loop.look()
    assert bench.script.seen == []
    assert [record.message for record in caplog.records] == ["the planner holds"]
    assert bench.loop.trouble == f"observe: {'no answer in time' if trouble == 'hangs' else 'it died'}"
    assert bench.value("failures_total", doing="observe") == 3
    assert bench.value("observation_age_seconds") == 3.0
    bench.cluster.hangs, bench.cluster.gone = False, None
    await bench.loop.look()
    assert len(bench.script.seen) == 1
    assert bench.loop.trouble is None
    assert bench.value("observation_age_seconds") == 0.0


async def test_a_planner_that_stumbles_is_asked_again() -> None:
    bench = Bench(RuntimeError("a bug"), MOVE)
    await bench.loop.look()
    assert bench.cluster.assigned == {}
    assert bench.loop.trouble == "decide: a bug"
    await bench.loop.look()
    assert bench.cluster.assigned == {"2": Role.PREFILL}
    assert bench.value("failures_total", doing="decide") == 1


async def test_it_goes_on_whatever_fails() -> None:
    bench = Bench(
        RuntimeError("a bug"), MOVE, RuntimeError("a bug"), HOLD, clock=MonotonicClock(), interval_s=0.005
    )
    task = asyncio.create_task(bench.loop.run())
    async with asyncio.timeout(5):
        while len(bench.script.seen) < 6:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("num_turns", range(5))
async def test_it_ends_when_it_is_cancelled_just_as_an_answer_comes(num_turns: int) -> None:
    bench = Bench(HOLD, call_timeout_s=5.0)
    asked, answer = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def observe() -> Observation:
        asked.set()
        await answer
        return observation()

    bench.cluster.observe = observe  # type: ignore[method-assign]
    task = asyncio.create_task(bench.loop.run())
    await asked.wait()
    answer.set_result(None)
    for _ in range(num_turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=0.5)
    assert task.cancelled()


async def test_moves_are_logged_with_reason_inputs_and_alternatives_and_a_hold_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "planner")
    bench = Bench(HOLD, HOLD, HOLD, MOVE, HOLD, HOLD)
    for _ in range(7):
        await bench.loop.look()
    logged = [record.fields for record in caplog.records if record.message == "planned"]
    assert [each["verdict"] for each in logged] == ["hold", "move", "hold"]
    assert logged[1]["reason"] == "more prompts"
    assert logged[1]["roles"] == "2 to prefill"
    assert logged[1]["counts"] == "s 4"
    assert logged[1]["inputs"] == "rate_rps 3.5"
    assert logged[1]["alternatives"] == "2P+1D 3.4, 1P+2D 2.1"


async def test_the_same_advice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "planner")
    bench = Bench(MOVE, MOVE, replace(MOVE, counts={"s": 5}), mode=Mode.ADVISE)
    for _ in range(3):
        await bench.loop.look()
    assert [record.fields["counts"] for record in caplog.records] == ["s 4", "s 5"]


async def test_metrics_show_the_split_the_prediction_and_the_inputs() -> None:
    bench = Bench(MOVE, replace(HOLD, inputs={"queue_tokens": 9.0}, alternatives=()))
    bench.step_times.observe("s", Role.DECODE, [StepObservation(num_decoding=1, seconds=0.004)] * 4)
    await bench.loop.look()
    assert bench.value("present_workers", role="prefill") == 1
    assert bench.value("present_workers", role="decode") == 2
    assert bench.value("wanted_workers", role="prefill") == 2
    assert bench.value("wanted_workers", role="decode") == 1
    assert bench.value("predicted_attainment", split="current") == 0.61
    assert bench.value("predicted_attainment", split="chosen") == 0.97
    assert bench.value("input", input="rate_rps") == 3.5
    assert bench.value("decision_cpu_seconds_count") == 1
    decode = {"shape": "s", "role": "decode", "phase": "decode"}
    expected = bench.step_times.of("s", Role.DECODE).decode_factor
    for _ in range(20):
        bench.step_times.observe("s", Role.DECODE, [StepObservation(num_decoding=1, seconds=0.004)])
    assert bench.value("step_time_factor", **decode) == expected
    await bench.loop.look()
    assert bench.value("step_time_factor", **decode) == pytest.approx(2.0)
    assert bench.value("input", input="rate_rps") is None
    assert bench.value("input", input="queue_tokens") == 9.0
    assert bench.value("predicted_attainment", split="chosen") is None


def past(number: int, verdict: Verdict = Verdict.HOLD, **changes: Any) -> PastDecision:
    decision = replace(HOLD, number=number, verdict=verdict, **changes)
    return PastDecision(at_s=float(number), decision=decision, cpu_s=0.001, carried_out=False)


def test_moves_are_remembered_longer_than_holds() -> None:
    history = History(capacity=3)
    history.add(past(1, Verdict.MOVE))
    for number in range(2, 10):
        history.add(past(number))
    assert [each.decision.number for each in history.last(2)] == [8, 9]
    assert [each.decision.number for each in history.last(9)] == [7, 8, 9]
    assert [each.decision.number for each in history.last(9, moves=True)] == [1]
    assert history.numbered(1) is not None
    assert history.numbered(4) is None
    assert history.last(0) == []


def test_what_is_remembered_becomes_json_even_if_a_figure_is_infinite() -> None:
    plain = past(1, Verdict.MOVE, inputs={"tpot_s": float("inf")}).as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["inputs"] == {"tpot_s": None}
    assert plain["verdict"] == "move"
