"""What is observed of steps finds its way to the routers and puts a wrong profile right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from core.corrected_step_time import CorrectedStepTime
from core.observed_steps import SampledStepTime, StepObservation, StepSample
from core.performance_model import (
    H200_LLAMA_8B_FP8,
    KvLink,
    PrefillChunk,
    ScaledStepTime,
    StepTime,
)
from core.step_times import StepTimes, prefill_s
from core.types import Role, WorkerLoad
from core.worker_events import WorkerModelConfig
from engine.base import EngineRequest
from engine.mock_engine import MockEngine, MockEngineConfig
from router.policy import LeastLoadPolicy
from router.policy_predictive import PredictivePolicy
from router.routing import Candidate, Decision, RoutingRequest
from router.worker_view import WorkerView
from simulator.actions import SwitchRole
from simulator.result import RequestTable
from simulator.simulation import Simulation
from simulator.spec import ClusterSpec
from simulator.traces.generator_text import workload_from_text
from simulator.traces.generators import generate
from tests.unit import simulated
from tests.unit.test_registry import report

TRUE = H200_LLAMA_8B_FP8
PROMPT = PrefillChunk(context_tokens=0, num_tokens=2000, ends_prompt=True)
WORKER = WorkerModelConfig(num_kv_blocks=20_000, max_num_batched_tokens=8192)
LINK = KvLink(latency_s=0.002, bytes_per_s=25e9)
WORKS = (((PROMPT,), 0, 0), ((), 40, 80_000), ((PROMPT,), 40, 80_000))


def observed(step_time: StepTime, prefills: Sequence[PrefillChunk], num: int, kv: int) -> StepObservation:
    """A step that lasts what ``step_time`` says."""
    return StepObservation(
        prefills=tuple(prefills),
        num_decoding=num,
        decode_kv_tokens=kv,
        seconds=step_time.step_s(prefills, num, kv),
    )


class TestLearning:
    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_prompts_are_told_from_the_decodes_they_share_steps_with(self, factor: float) -> None:
        corrected = CorrectedStepTime(ScaledStepTime(step_time=TRUE, factor=factor))
        for _ in range(40):
            corrected.observe_steps([observed(TRUE, (), 40, 80_000), observed(TRUE, (PROMPT,), 40, 80_000)])
        for work in WORKS:
            assert corrected.step_s(*work) == pytest.approx(TRUE.step_s(*work), rel=0.02)

    def test_a_small_prompt_among_many_decodes_says_nothing(self) -> None:
        corrected = CorrectedStepTime(TRUE)
        small = replace(PROMPT, num_tokens=10, ends_prompt=False)
        slow = replace(observed(TRUE, (small,), 200, 400_000), seconds=1.0)
        corrected.observe_steps([slow] * 100)
        assert (corrected.prefill_factor, corrected.decode_factor) == (1.0, 1.0)

    def test_a_right_profile_stays_exactly_as_it_is(self) -> None:
        corrected = CorrectedStepTime(TRUE)
        for num in range(1, 200):
            corrected.observe_steps([observed(TRUE, (), num, 7 * num), observed(TRUE, (PROMPT,), num, num)])
        assert (corrected.prefill_factor, corrected.decode_factor) == (1.0, 1.0)

    def test_a_role_starts_from_what_is_seen_of_the_other(self) -> None:
        times = StepTimes(lambda shape: ScaledStepTime(step_time=TRUE, factor=2.0))
        for _ in range(20):
            times.observe("s", Role.PREFILL, [observed(TRUE, (PROMPT,), 0, 0)])
            times.observe("s", Role.DECODE, [observed(TRUE, (), 40, 80_000)])
        decode, other_shape = times.of("s", Role.DECODE), times.of("t", Role.DECODE)
        assert decode is not None
        assert other_shape is not None
        assert prefill_s(decode, 2000, 0) == pytest.approx(prefill_s(TRUE, 2000, 0))
        assert other_shape.prefill_factor == 1.0
        own = ScaledStepTime(step_time=TRUE, factor=3.0)
        for _ in range(20):
            times.observe("s", Role.DECODE, [observed(own, (PROMPT,), 0, 0)])
        assert prefill_s(decode, 2000, 0) == pytest.approx(prefill_s(own, 2000, 0))

    def test_a_shape_without_a_profile_learns_nothing(self) -> None:
        times = StepTimes()
        times.observe("s", Role.DECODE, [observed(TRUE, (), 1, 1)])
        assert times.of("s", Role.DECODE) is None


class TestSample:
    def test_it_keeps_as_many_steps_with_prompts_as_without(self) -> None:
        sampled = SampledStepTime(TRUE)
        for num in range(1, 10):
            sampled.step_s((), num, 0)
        sampled.step_s((PROMPT,), 3, 30)
        assert sampled.steps.take() == (
            observed(TRUE, (), 1, 0),
            observed(TRUE, (), 2, 0),
            observed(TRUE, (PROMPT,), 3, 30),
        )
        assert sampled.steps.take() == ()

    def test_what_was_taken_makes_room(self) -> None:
        sample = StepSample(num_of_a_kind=1)
        for num in (1, 2):
            sample.add(observed(TRUE, (), num, 0))
        assert not sample.wants(())
        assert sample.wants((PROMPT,))
        assert [step.num_decoding for step in sample.take()] == [1]
        assert sample.wants(())


class TestReports:
    def test_a_report_that_comes_again_is_counted_once(self) -> None:
        times = StepTimes(lambda shape: TRUE)
        slow = observed(ScaledStepTime(step_time=TRUE, factor=3.0), (), 40, 80_000)
        first = replace(report("w"), heartbeat=1, role=Role.DECODE, steps=(slow,))
        view = WorkerView(first, SimpleNamespace(now_s=lambda: 0.0), times)
        for _ in range(50):
            view.on_report(replace(first, load=WorkerLoad(num_running=1)))
        assert factors(times, first.shape) == (1.0, 1.0)  # one observation does not outweigh the profile
        for heartbeat in range(2, 10):
            view.on_report(replace(first, heartbeat=heartbeat))
        assert factors(times, first.shape) == (1.0, 3.0)

    def test_steps_count_for_the_role_they_were_run_in(self) -> None:
        """Decode workers are as slow as the profile says, prefill workers three times as slow."""
        slow = ScaledStepTime(step_time=simulated.STEP, factor=3.0)
        group = simulated.group(1, 2)
        spec = ClusterSpec(
            groups=(
                replace(
                    group,
                    step_time={Role.PREFILL: slow, Role.DECODE: simulated.STEP},
                    assumed_step_time=simulated.STEP,
                ),
            )
        )
        what = simulated.trace(*((0.1 * n, 40, 8) for n in range(300)))
        simulation = Simulation(
            what,
            spec,
            LeastLoadPolicy,
            [SwitchRole(time_s=10.0, worker_id="w-1", role=Role.PREFILL)],
            1,
            None,
        )
        simulation.run()
        times = simulation.routers[0]._step_times
        assert factors(times, "w", Role.PREFILL)[0] == pytest.approx(3.0)
        assert factors(times, "w", Role.DECODE)[1] == 1.0

    async def test_a_mock_engine_tells_of_the_steps_it_makes(self) -> None:
        pace = ScaledStepTime(step_time=TRUE, factor=0.1)
        engine = MockEngine(
            MockEngineConfig(incarnation="e", step_time=TRUE, time_scale=0.1, link=LINK, worker=WORKER)
        )
        async for _ in engine.generate(
            EngineRequest(request_id="r", prompt_token_ids=[1] * 50, max_tokens=9)
        ):
            pass
        steps = engine.take_steps()
        assert [len(step.prefills) for step in steps] == [1, 0, 0]
        for step in steps:
            assert step == observed(pace, step.prefills, step.num_decoding, step.decode_kv_tokens)
        assert engine.take_steps() == ()
        await engine.shutdown(1.0)


def factors(times: StepTimes, shape: str, role: Role = Role.DECODE) -> tuple[float, float]:
    step_time = times.of(shape, role)
    assert step_time is not None
    return step_time.prefill_factor, step_time.decode_factor


class Noting(PredictivePolicy):
    """Keeps what it predicts for each request that is placed for the first time."""

    def __init__(self, random_seed: int | None = None) -> None:
        super().__init__(random_seed)
        self.ttft_s: list[float] = []

    def choose(
        self, candidates: Sequence[Candidate], request: RoutingRequest, excluded: Sequence[str] = ()
    ) -> Decision:
        decision = super().choose(candidates, request, excluded)
        if not excluded:
            assert decision.ttft_s is not None
            self.ttft_s.append(decision.ttft_s)
        return decision


TTFT_S, TPOT_S = 0.3, 0.012
LEARNING_S = 60.0


class Traffic:
    """Two minutes of traffic that now and then is more than the prefill worker can take."""

    def __init__(self) -> None:
        load = "poisson:rate=18,prompt=2000~5000,output=150~500,duration=120"
        self.trace = generate(workload_from_text(load), 1)

    def run(self, assumed: StepTime) -> tuple[RequestTable, list[float], StepTimes]:
        """What became of the requests, the TTFTs that were predicted, and the router's step times."""
        spec = simulated.cluster(
            1,
            3,
            ttft_slo_s=TTFT_S,
            tpot_slo_s=TPOT_S,
            group_settings={
                "step_time": TRUE,
                "assumed_step_time": assumed,
                "worker": WORKER,
                "kv_bytes_per_token": 65_536,
                "link": LINK,
            },
        )
        policies: list[Noting] = []

        def make_policy(seed: int) -> Noting:
            policies.append(Noting(seed))
            return policies[-1]

        simulation = Simulation(self.trace, spec, make_policy, (), 1, None)
        requests = simulation.run().requests
        return requests, policies[0].ttft_s, simulation.routers[0]._step_times


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture(scope="module")
def right(traffic: Traffic) -> RequestTable:
    return traffic.run(TRUE)[0]


def attainment(requests: RequestTable) -> float:
    met = (requests.ttft_s <= TTFT_S) & (np.isnan(requests.tpot_s) | (requests.tpot_s <= TPOT_S))
    return float(met[requests.arrival_s > LEARNING_S].mean())


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_profile_that_is_wrong_by_two_is_right_within_a_minute(
    factor: float, traffic: Traffic, right: RequestTable
) -> None:
    requests, predicted_s, times = traffic.run(ScaledStepTime(step_time=TRUE, factor=factor))
    for role, prefills, num, kv in [
        (Role.PREFILL, (PROMPT,), 0, 0),
        (Role.DECODE, (PROMPT,), 0, 0),
        (Role.DECODE, (), 40, 80_000),
    ]:
        step_time = times.of("w", role)
        assert step_time is not None
        assert step_time.step_s(prefills, num, kv) == pytest.approx(TRUE.step_s(prefills, num, kv), rel=0.15)
    errors = np.abs(np.array(predicted_s) / requests.ttft_s - 1)[requests.arrival_s > LEARNING_S]
    assert np.median(errors) < 0.15
    assert attainment(requests) == pytest.approx(attainment(right), abs=0.02)
