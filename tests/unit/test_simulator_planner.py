"""A planner in the simulated cluster: what it sees, and what comes of what it decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import Clock
from core.request import Path
from core.step_times import StepTimes
from core.types import Role
from core.worker_events import WorkerModelConfig
from planner.decision import Alternative, PlanDecision, RoleChange, Verdict
from planner.observation import Observation
from planner.settings import PlannerSettings
from router.admission_limits import AdmissionLimits
from simulator.actions import Kill
from simulator.planner_loop import MakePlanner
from simulator.reports.report import render_report
from simulator.reports.summary import slo_met, summarize, to_json
from simulator.result import Outcome, SimulationResult, Slo
from simulator.simulation import simulate
from simulator.spec import ClusterSpec
from simulator.traces.trace import Trace, TraceRequest
from tests.unit.simulated import CheckedSimulation, cluster, trace
from tests.unit.test_simulator_laws import QUIET_S, check_result

SETTINGS = PlannerSettings(shapes=(), ttft_slo_s=0.5, tpot_slo_s=0.05)
Changes = dict[str, Any]
"""Fields of a decision."""
P, D = Role.PREFILL, Role.DECODE


class Scripted:
    """Decides what it was told for each look, and keeps what it saw."""

    def __init__(self, decide: Callable[[int, Observation], Changes], clock: Clock) -> None:
        self.seen: list[tuple[float, Observation]] = []
        self._decide = decide
        self._clock = clock

    def step(self, observation: Observation) -> PlanDecision:
        now_s = self._clock.now_s()
        self.seen.append((now_s, observation))
        changes = self._decide(len(self.seen), observation)
        verdict = Verdict.MOVE if changes else Verdict.HOLD
        decision = PlanDecision(
            number=len(self.seen), at_s=now_s, verdict=verdict, reason="as written", split="1P+1D"
        )
        return replace(decision, **changes)


class Script:
    """Makes a scripted planner, and finds it again after the run."""

    def __init__(self, decide: Callable[[int, Observation], Changes]) -> None:
        self._decide = decide
        self.planner: Scripted

    def __call__(self, settings: PlannerSettings, step_times: StepTimes, clock: Clock) -> Scripted:
        self.planner = Scripted(self._decide, clock)
        return self.planner

    @property
    def seen(self) -> list[tuple[float, Observation]]:
        return self.planner.seen


def script(**by_look: Changes) -> Script:
    """``look_3={...}``: what it decides at its third look."""
    return Script(lambda look, _: by_look.get(f"look_{look}", {}))


def roles(**by_worker: Role) -> Changes:
    changes = [
        RoleChange(worker_id=name.replace("_", "-"), shape="w", role=r) for name, r in by_worker.items()
    ]
    return {"role_changes": tuple(changes)}


def run(what: Trace, spec: ClusterSpec, make_planner: MakePlanner, *actions: Any) -> SimulationResult:
    """Simulates, checked at every event and until nothing is left."""
    simulation = CheckedSimulation(what, with_planner(spec), actions, 0, make_planner)
    result = simulation.run()
    check_result(what, result)
    simulation.assert_nothing_is_left(QUIET_S)
    return result


def with_planner(spec: ClusterSpec, **more: Any) -> ClusterSpec:
    return replace(spec, planner=replace(SETTINGS, **more))


def steady(num_requests: int, every_s: float, prompt: int = 100, output: int = 40) -> Trace:
    return trace(*[(every_s * n, prompt, output) for n in range(num_requests)])


def happened(result: SimulationResult) -> list[tuple[float, str, str]]:
    return [(round(event.time_s, 6), event.kind, event.worker_id) for event in result.events]


class TestRoles:
    @pytest.mark.parametrize("num_routers", [1, 2])
    def test_a_role_change_reaches_the_worker_and_all_routers_in_the_stated_time(
        self, num_routers: int
    ) -> None:
        spec = cluster(0, 2, num_routers=num_routers, role_switch_s=0.2)
        # The planner looks at 0.5 s, halfway between two heartbeats; routers take 4 ms to decide.
        what = trace(
            (0.1, 100, 2), (0.2, 100, 2), (0.69, 100, 2), (0.692, 100, 2), (0.7, 100, 2), (0.9, 99, 2)
        )
        result = run(what, spec, script(look_1=roles(w_0=P)))
        assert result.requests.path.tolist() == [Path.LOCAL] * 4 + [Path.REMOTE_EARLY] * 2
        assert happened(result) == [(0.7, "role_switch", "w-0")]

    def test_nothing_is_dropped_when_all_roles_change_at_once_again_and_again(self) -> None:
        there, back = roles(w_0=D, w_1=D, w_2=P, w_3=P), roles(w_0=P, w_1=P, w_2=D, w_3=D)
        swapping = Script(lambda look, _: there if look % 2 else back)
        spec = with_planner(cluster(2, 2, num_routers=2, heartbeat_s=0.5), interval_s=0.3)
        simulation = CheckedSimulation(steady(200, 0.02, 150, 60), spec, (), 0, swapping)
        result = simulation.run()
        simulation.assert_nothing_is_left(1.0)  # no time for a forgotten lease to end
        assert (result.requests.outcome == Outcome.DONE).all()
        assert result.num_role_switches > 40

    def test_the_last_of_two_conflicting_changes_holds(self) -> None:
        spec = cluster(1, 2, role_switch_s=1.5)
        result = run(steady(60, 0.1), spec, script(look_1=roles(w_1=P), look_2=roles(w_1=D)))
        assert (result.requests.outcome == Outcome.DONE).all()
        assert happened(result) == []

    def test_what_cannot_be_done_is_noted_and_ignored(self) -> None:
        group_settings = {"allowed_roles": frozenset({D})}
        spec = cluster(0, 2, group_settings=group_settings)
        orders = roles(w_0=P, w_9=D) | {"counts": {"x": 3}}
        result = run(steady(5, 0.2), spec, script(look_1=orders))
        assert [kind for _, kind, _ in happened(result)] == ["ignored"] * 3
        assert (result.requests.outcome == Outcome.DONE).all()


class TestCounts:
    def test_more_workers_come_after_their_start_up_with_the_role_the_split_lacks(self) -> None:
        # One of two prefill workers is to decode; 1P+3D is then what newcomers are given roles by.
        changes = roles(w_0=D) | {"counts": {"w": 6}}
        looks = script(look_2=changes)
        result = run(steady(100, 0.1), cluster(2, 2), looks)
        starts = [event for event in result.events if event.kind == "start"]
        assert [(event.time_s, event.worker_id) for event in starts] == [(4.6, "w-4"), (4.6, "w-5")]
        wanted = {now_s: seen.wanted["w"] for now_s, seen in looks.seen}
        present = {now_s: len(seen.workers) for now_s, seen in looks.seen}
        assert [wanted[1.5], wanted[2.5], wanted[5.5]] == [4, 6, 6]
        assert [present[2.5], present[4.5], present[5.5]] == [4, 4, 6]
        held_s = 4 * result.simulated_s + 2 * (result.simulated_s - 1.6)
        assert result.gpu_seconds == pytest.approx(held_s)

    def test_fewer_workers_the_newest_drain_and_go(self) -> None:
        looks = script(look_2={"counts": {"w": 2}} | roles(w_1=D))
        result = run(steady(100, 0.05, output=100), cluster(2, 3), looks)
        assert (result.requests.outcome == Outcome.DONE).all()
        stops = [event.worker_id for event in result.events if event.kind == "stop"]
        assert stops == ["w-4", "w-3", "w-2"]

    def test_the_last_decode_workers_can_go_once_another_one_has_their_role(self) -> None:
        looks = script(look_1={"counts": {"w": 1}} | roles(w_0=D))
        result = run(steady(100, 0.05), cluster(1, 2), looks)
        assert (result.requests.outcome == Outcome.DONE).all()
        assert set(result.requests.path[40:]) == {Path.LOCAL}

    def test_workers_that_have_not_started_go_first(self) -> None:
        looks = script(look_1={"counts": {"w": 5}}, look_2={"counts": {"w": 4}}, look_3={"counts": {"w": 2}})
        result = run(steady(100, 0.1), cluster(1, 2), looks)
        stops = [(now_s, worker_id) for now_s, kind, worker_id in happened(result) if kind == "stop"]
        assert stops == [(1.6, "w-4"), (2.6, "w-3"), (2.6, "w-2")]
        assert not [event for event in result.events if event.kind == "start"]
        # w-2 leaves with its first heartbeat after it has drained.
        held_s = 2 * result.simulated_s + 3.0 + 2.0 + 1.0  # w-2, w-3, w-4
        assert result.gpu_seconds == pytest.approx(held_s)

    looks = st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 6), st.sampled_from(Role)), max_size=5),
            st.one_of(st.none(), st.integers(1, 6)),
        ),
        max_size=8,
    )
    small = st.builds(
        WorkerModelConfig,
        num_kv_blocks=st.sampled_from([40, 400]),
        block_size_tokens=st.just(4),
        hash_block_tokens=st.just(4),
        max_num_seqs=st.sampled_from([2, 8]),
        max_num_batched_tokens=st.sampled_from([16, 256]),
        lease_s=st.just(4.0),
    )

    @settings(max_examples=30, deadline=None)
    @given(looks, small, st.integers(1, 3), st.sampled_from([0.0, 0.1, 1.2]))
    def test_whatever_it_decides_the_laws_hold(
        self, orders: Sequence[Any], worker: WorkerModelConfig, num_routers: int, role_switch_s: float
    ) -> None:
        def decide(look: int, _: Observation) -> Changes:
            if look > len(orders):
                return {}
            changes, count = orders[look - 1]
            moves = [RoleChange(worker_id=f"w-{n}", shape="w", role=role) for n, role in changes]
            return {"role_changes": tuple(moves), "counts": {} if count is None else {"w": count}}

        spec = cluster(
            1,
            2,
            group_settings={"worker": worker, "startup_s": 0.7},
            num_routers=num_routers,
            role_switch_s=role_switch_s,
        )
        # Local prefill serves where no worker prefills; none decodes only if the script says so.
        run(steady(60, 0.1, prompt=60, output=20), spec, Script(decide))


class TestWhatItSees:
    def test_reports_are_half_a_heartbeat_old_and_summaries_at_most_a_second(self) -> None:
        looks = script()
        run(steady(50, 0.1), cluster(1, 2, num_routers=4), looks)
        for _, seen in looks.seen:
            assert {worker.age_s for worker in seen.workers} == {0.5}
            assert all(0 <= router.age_s < 1 for router in seen.routers)
        assert len(looks.seen[-1][1].routers) == 4

    def test_a_dead_worker_is_present_until_its_heartbeats_have_been_missed(self) -> None:
        looks = script()
        spec = cluster(1, 2, group_settings={"startup_s": 5.0})
        run(steady(120, 0.1), spec, looks, Kill(time_s=1.7, worker_id="w-2"))
        ages = {
            now_s: {w.report.worker_id: w.age_s for w in seen.workers}.get("w-2")
            for now_s, seen in looks.seen
        }
        assert [ages[n + 0.5] for n in range(8)] == [0.5, 0.5, 1.5, 2.5, None, None, None, 0.5]

    def test_desired_roles_differ_from_reported_ones_until_the_worker_knows(self) -> None:
        looks = script(look_1=roles(w_0=D))
        run(steady(50, 0.1), cluster(1, 2, role_switch_s=1.2), looks)
        of_worker = [
            next((w.report.role, w.desired_role) for w in seen.workers if w.report.worker_id == "w-0")
            for _, seen in looks.seen
        ]
        assert of_worker[:3] == [(P, P), (P, D), (D, D)]

    def test_loads_are_those_of_the_last_heartbeat_though_no_event_happened_since(self) -> None:
        looks = script()
        worker = WorkerModelConfig(
            num_kv_blocks=1000, block_size_tokens=4, max_num_seqs=4, max_num_batched_tokens=512
        )
        run(trace((0.0, 100, 1500)), cluster(1, 1, group_settings={"worker": worker}), looks)
        used = [seen.workers[1].report.load.kv_used_blocks for _, seen in looks.seen]
        # 6 ms a step, 4 tokens a block: about 41 blocks more every second.
        assert all(35 < after - before < 45 for before, after in pairwise(used[2:9]))

    def test_tokens_are_counted_as_they_come(self) -> None:
        looks = script()
        run(trace((0.0, 100, 1500)), cluster(1, 1), looks)
        for now_s, seen in looks.seen[2:8]:
            (router,) = seen.routers
            said_at_s = now_s - router.age_s
            assert router.traffic.num_ongoing == 1
            assert router.traffic.output_tokens == pytest.approx(said_at_s / 0.006, abs=12)
            assert sum(router.traffic.num_ended) == 0

    @pytest.mark.parametrize("admission", [None, AdmissionLimits()])
    def test_counts_are_those_of_the_result(self, admission: AdmissionLimits | None) -> None:
        worker = WorkerModelConfig(  # too small for the load: sequences are preempted
            num_kv_blocks=90, block_size_tokens=4, max_num_seqs=8, max_num_batched_tokens=64, lease_s=4.0
        )
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, 90, (150, 2))
        rows = [
            TraceRequest(
                arrival_s=0.02 * n,
                prompt_tokens=int(prompt),
                output_tokens=int(output),
                ttft_slo_s=0.4 if n % 5 == 0 else None,
            )
            for n, (prompt, output) in enumerate(lengths)
        ]
        spec = cluster(
            1, 2, group_settings={"worker": worker}, num_routers=2, ttft_slo_s=1.0, tpot_slo_s=0.02
        )
        spec = replace(spec, admission=admission)
        simulation = CheckedSimulation(trace(*rows), with_planner(spec), (), 0, script())
        result = simulation.run()
        ends = [router.traffic.counter for router in simulation.routers]
        said = [end.summary(num_waiting=0, waiting_prompt_tokens=0, num_ongoing=0) for end in ends]
        done = result.requests.outcome == Outcome.DONE
        ttft_met, tpot_met = slo_met(result.requests, Slo(ttft_s=1.0, tpot_s=0.02))
        assert 0 < (ttft_met & tpot_met).sum() < done.sum()
        assert sum(s.output_tokens for s in said) == result.requests.output_tokens.sum()
        assert sum(s.num_met for s in said) == (ttft_met & tpot_met).sum()
        assert sum(s.num_missed_ttft for s in said) == (done & ~ttft_met).sum()
        assert sum(s.num_missed_tpot for s in said) == (done & ttft_met & ~tpot_met).sum()
        assert sum(sum(s.num_ended) for s in said) == done.sum()
        assert sum(sum(s.num_arrived) for s in said) == 150
        assert sum(sum(s.prompt_tokens) for s in said) == result.requests.prompt_tokens.sum()
        assert sum(s.num_reached[0] for s in said) == (result.requests.output_tokens > 0).sum()
        num_refused = 0 if result.requests.refusal is None else (result.requests.refusal != "").sum()
        assert sum(s.num_refused for s in said) == num_refused
        assert sum(s.num_failed for s in said) == 150 - done.sum() - num_refused
        if admission is None:
            assert result.num_preemptions
        else:
            assert num_refused

    def test_cached_tokens_are_those_the_router_expects(self) -> None:
        looks = script()
        rows = [
            TraceRequest(arrival_s=0.3 * n, prompt_tokens=42, output_tokens=5, block_hashes=tuple(range(10)))
            for n in range(10)
        ]
        run(trace(*rows), cluster(0, 1), looks)
        traffic = looks.seen[-1][1].routers[0].traffic
        num = sum(traffic.num_arrived)
        assert sum(traffic.placed_tokens) == 42 * num
        assert sum(traffic.cached_tokens) == 40 * (num - 1)

    def test_the_line_is_told_of(self) -> None:
        looks = script()
        worker = WorkerModelConfig(
            num_kv_blocks=1000, block_size_tokens=4, max_num_seqs=1, max_num_batched_tokens=512
        )
        limits = AdmissionLimits(max_wait_s=100.0, early_rejection=False)
        spec = cluster(0, 1, group_settings={"worker": worker}, ttft_slo_s=50.0, tpot_slo_s=1.0)
        spec = replace(spec, admission=limits)
        run(steady(40, 0.01, prompt=100, output=40), spec, looks)
        traffic = next(seen.routers[0].traffic for now_s, seen in looks.seen if now_s > 1.4)
        assert traffic.num_waiting > 5
        assert traffic.waiting_prompt_tokens == 100 * traffic.num_waiting


class TestResult:
    def test_every_look_is_recorded_with_what_it_cost(self) -> None:
        looks = script(look_2=roles(w_0=D))
        result = simulate(steady(100, 0.1), with_planner(cluster(2, 2), interval_s=0.5), make_planner=looks)
        assert [decision.at_s for decision in result.decisions] == [0.5 * n for n in range(1, 21)]
        assert [d.number for d in result.decisions if d.changes_something] == [2]
        assert 0 <= result.planner_cpu_max_s <= result.planner_cpu_s

    def test_without_a_planner_there_is_nothing(self) -> None:
        result = simulate(steady(10, 0.1), cluster(1, 1))
        assert result.decisions == ()
        assert "planner" not in summarize(result, Slo(ttft_s=1, tpot_s=1), settings={})

    def test_the_same_seed_gives_the_same_result(self) -> None:
        def by_load(look: int, seen: Observation) -> Changes:
            tokens = sum(router.traffic.output_tokens for router in seen.routers)
            return roles(w_1=D if tokens % 2 else P)

        def once() -> tuple[SimulationResult, str]:
            spec = with_planner(cluster(2, 2, num_routers=2))
            result = simulate(steady(300, 0.03), spec, make_planner=Script(by_load), seed=3)
            return result, to_json(summarize(result, Slo(ttft_s=0.1, tpot_s=0.01), settings={}))

        (first, first_text), (second, second_text) = once(), once()
        assert first.decisions == second.decisions
        assert first.events == second.events
        assert first.requests.e2e_s.tobytes() == second.requests.e2e_s.tobytes()
        assert first_text == second_text
        assert first.num_role_switches > 2

    def test_summary_and_report_tell_of_the_moves(self) -> None:
        alternatives = tuple(
            Alternative(split=split, num_gpus=4, attainment=attainment, score=score)
            for split, attainment, score in (("1P+3D", 0.97, 9.5), ("2P+2D", 0.8, 8.25))
        )
        move = roles(w_0=D, w_1=D) | {
            "split": "1P+3D",
            "reason": "decode <was> short",
            "alternatives": alternatives,
            "inputs": {"rate_rps": 10.0},
        }
        looks = Script(lambda look, _: move if look == 3 else {"split": "2P+2D" if look < 3 else "1P+3D"})
        result = simulate(steady(100, 0.1), with_planner(cluster(2, 2)), make_planner=looks)
        slo = Slo(ttft_s=1, tpot_s=1)
        summary = summarize(result, slo, settings={})
        figures = summary["planner"]
        assert figures["mean_gpus"] == 4
        assert figures["switches_per_hour"] == pytest.approx(2 * 3600 / result.simulated_s)
        (told,) = figures["moves"]
        assert told["alternatives"][0] == {"split": "1P+3D", "num_gpus": 4, "attainment": 0.97, "score": 9.5}
        assert told["inputs"] == {"rate_rps": 10.0}
        page = render_report(result, summary, slo, title="t")
        for text in ("2 x w to decode", "decode &lt;was&gt; short", "1.25", "1P+3D 97.0% (9.50)", "0:00:02"):
            assert text in page
