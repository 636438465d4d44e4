"""Predictions: sane in every corner, and right about which split is best where the simulator can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.performance_model import H200_LLAMA_8B_FP8, KvLink, ScaledStepTime
from core.types import Role
from core.worker_events import WorkerModelConfig
from planner.capacity import decode_capacities, prefill_capacity
from planner.demand import Demand, Forecast, PromptKind, Scenario
from planner.prediction import ClusterState, Prediction, QueueingPredictor, Targets
from planner.split import PlannedSplit, ShapeSplit
from router.admission_limits import AdmissionLimits
from router.policy_predictive import PredictivePolicy
from simulator.reports.summary import slo_met
from simulator.result import Slo
from simulator.simulation import simulate
from simulator.spec import ClusterSpec, WorkerGroup
from simulator.traces.trace import Trace, TraceRequest
from tests.unit.planned import demand, kind

TARGETS = Targets(ttft_s=0.5, tpot_s=0.02)
PREDICT = QueueingPredictor(TARGETS)
TOLERANCE = 0.03


def split(num_prefill: int, num_decode: int) -> PlannedSplit:
    return PlannedSplit((ShapeSplit("s", num_prefill, num_decode),))


def predict(load: Demand, *splits: PlannedSplit, state: ClusterState | None = None) -> list[Prediction]:
    return PREDICT({"s": kind()}, splits, Forecast(demand=load), state or ClusterState())


def attained(load: Demand, num_prefill: int, num_decode: int) -> float:
    return predict(load, split(num_prefill, num_decode))[0].attainment


LOADS = [demand(1.0), demand(1.0, 500, 800), demand(1.0, 8000, 50), demand(1.0, 100, 10)]


def named(load: Demand) -> str:
    return f"{load.prompt_tokens:g}-{load.output_tokens:g}"


class TestSense:
    @pytest.mark.parametrize("load", LOADS, ids=named)
    @pytest.mark.parametrize("num_prefill", range(5))
    def test_more_requests_never_do_better(self, load: Demand, num_prefill: int) -> None:
        rates = [0.5, 2.0, 8.0, 15.0, 20.0, 25.0, 30.0, 50.0, 100.0, 1000.0]
        found = [attained(replace(load, rate_rps=rate), num_prefill, 5 - num_prefill) for rate in rates]
        assert all(more <= less + 1e-3 for less, more in pairwise(found))

    @pytest.mark.parametrize("load", LOADS, ids=named)
    @pytest.mark.parametrize("rate_rps", [2.0, 10.0, 25.0, 60.0, 200.0])
    def test_more_workers_are_never_worse(self, load: Demand, rate_rps: float) -> None:
        sizes = range(5)
        splits = [split(num_prefill, num_decode) for num_prefill in sizes for num_decode in sizes]
        found = predict(replace(load, rate_rps=rate_rps), *splits)
        by_split = dict(zip(splits, (each.attainment for each in found), strict=True))
        for each, share in by_split.items():
            for more in (
                split(each.num_prefill + 1, each.num_decode),
                split(each.num_prefill, each.num_decode + 1),
            ):
                assert by_split.get(more, 1.0) >= share - TOLERANCE

    def test_where_nobody_decodes_nothing_is_served(self) -> None:
        assert attained(demand(1.0), 4, 0) == 0.0
        assert attained(demand(1.0), 0, 0) == 0.0

    def test_decode_workers_can_do_it_alone(self) -> None:
        (alone,) = predict(demand(5.0), split(0, 4))
        assert alone.attainment > 0.95
        assert alone.prefill_use > 1e6
        assert attained(demand(60.0), 0, 4) < attained(demand(60.0), 2, 2)

    def test_use_is_work_over_capacity(self) -> None:
        one, four = predict(demand(10.0), split(1, 1), split(4, 4))
        assert one.prefill_use == pytest.approx(4 * four.prefill_use)
        assert one.decode_use == pytest.approx(4 * four.decode_use)

    def test_prompts_too_long_for_the_target_are_missed_wherever_they_go(self) -> None:
        kinds = (
            PromptKind(new_tokens=1000, cached_tokens=0, share=0.7),
            PromptKind(new_tokens=100_000, cached_tokens=0, share=0.3),
        )
        load = Demand(rate_rps=0.01, prompts=kinds, output_tokens=100)
        assert attained(load, 8, 8) == pytest.approx(0.7, abs=0.01)

    def test_what_is_cached_need_not_be_computed(self) -> None:
        cached = PromptKind(new_tokens=500, cached_tokens=5500, share=1.0)
        load = demand(40.0, 6000)
        assert attained(replace(load, prompts=(cached,)), 1, 3) > attained(load, 1, 3) + 0.2

    def test_a_backlog_counts_as_load(self) -> None:
        load = demand(18.0)
        calm, pressed = (
            predict(load, split(1, 3), state=ClusterState(waiting_prompt_tokens=tokens))[0].attainment
            for tokens in (0.0, 300_000.0)
        )
        assert pressed < calm - 0.02

    def test_answers_that_go_on_count_as_load(self) -> None:
        load = demand(10.0, 1000, 2000)
        calm, pressed = (
            predict(load, split(3, 1), state=ClusterState(num_decoding=num))[0].attainment
            for num in (0.0, 2000.0)
        )
        assert pressed < calm

    def test_bursts_miss_more(self) -> None:
        steady, bursty = (attained(demand(18.0, arrival_dispersion=each), 1, 3) for each in (1.0, 20.0))
        assert bursty < steady

    def test_scenarios_are_weighed(self) -> None:
        def of(factor: float, weight: float) -> Scenario:
            return Scenario(weight=weight, prefill_factor=factor, decode_factor=factor)

        load, way = demand(20.0), [split(1, 3)]
        forecasts = [
            Forecast(demand=load, scenarios=scenarios)
            for scenarios in ((of(0.5, 1.0),), (of(3.0, 1.0),), (of(0.5, 0.5), of(3.0, 0.5)))
        ]
        low, high, both = (
            PREDICT({"s": kind()}, way, forecast, ClusterState())[0].attainment for forecast in forecasts
        )
        assert both == pytest.approx((low + high) / 2)

    def test_shapes_add_up_and_the_faster_one_counts_for_more(self) -> None:
        slow = kind(ScaledStepTime(step_time=H200_LLAMA_8B_FP8, factor=2.0))
        kinds = {"fast": kind(), "slow": slow}

        def both(fast: tuple[int, int], slow: tuple[int, int]) -> PlannedSplit:
            return PlannedSplit((ShapeSplit("fast", *fast), ShapeSplit("slow", *slow)))

        splits = [both((1, 1), (0, 0)), both((1, 1), (1, 1)), both((0, 1), (1, 0)), both((1, 0), (0, 1))]
        found = PREDICT(kinds, splits, Forecast(demand=demand(15.0)), ClusterState())
        assert found[1].attainment >= found[0].attainment
        assert found[1].prefill_use < found[0].prefill_use < found[2].prefill_use
        assert found[3].decode_use > found[2].decode_use


class TestCapacity:
    def test_slots_are_the_largest_batch_whose_steps_keep_the_target(self) -> None:
        load = demand(1.0, 1000, 500)
        (capacity,) = decode_capacities(kind(), load, 0.012, [0.0])
        num = round(capacity.num_slots)
        step_s = H200_LLAMA_8B_FP8.step_s
        assert 1 < num < 256
        assert step_s((), num, num * 1250) <= 0.012
        assert step_s((), num + 2, (num + 2) * 1250) > 0.0117

    def test_kv_and_batch_limits_hold(self) -> None:
        load = demand(1.0, 1000, 500)
        for limits, most in (({"max_num_seqs": 9}, 9), ({"kv_capacity_tokens": 12_500}, 10)):
            (capacity,) = decode_capacities(kind(**limits), load, 1.0, [0.0])
            assert capacity.num_slots == most

    def test_prompts_on_the_side_leave_fewer_slots_and_a_target_below_a_step_none(self) -> None:
        shares = [0.0, 0.2, 0.5]
        slots = [each.num_slots for each in decode_capacities(kind(), demand(1.0), 0.012, shares)]
        assert slots == sorted(slots, reverse=True)
        assert slots[0] > slots[2]
        assert decode_capacities(kind(), demand(1.0), 0.001, [0.0])[0].num_slots == 0.0

    def test_a_queue_of_prompts_goes_faster_than_one_by_one(self) -> None:
        capacity = prefill_capacity(kind(), demand(1.0, 500))
        assert 0 < capacity.mean_s < capacity.alone_s[0]
        assert capacity.variation == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    rate_rps=st.floats(0.0, 1e9),
    prompts=st.lists(
        st.tuples(st.floats(1.0, 1e6), st.floats(0.0, 1e6), st.floats(0.01, 1.0)), min_size=1, max_size=4
    ),
    output_tokens=st.floats(1.0, 1e6),
    dispersion=st.floats(1.0, 100.0),
    waiting=st.floats(0.0, 1e12),
    decoding=st.one_of(st.none(), st.floats(0.0, 1e9)),
    counts=st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), min_size=1, max_size=5),
)
def test_it_is_a_share_whatever_comes(
    rate_rps: float,
    prompts: list[tuple[float, float, float]],
    output_tokens: float,
    dispersion: float,
    waiting: float,
    decoding: float | None,
    counts: list[tuple[int, int]],
) -> None:
    total = sum(share for _, _, share in prompts)
    load = Demand(
        rate_rps=rate_rps,
        prompts=tuple(
            PromptKind(new_tokens=new, cached_tokens=cached, share=share / total)
            for new, cached, share in prompts
        ),
        output_tokens=output_tokens,
        arrival_dispersion=dispersion,
    )
    state = ClusterState(waiting_prompt_tokens=waiting, num_decoding=decoding)
    for found in predict(load, *(split(*each) for each in counts), state=state):
        assert 0.0 <= found.attainment <= 1.0 + 1e-9
        assert np.isfinite([found.prefill_use, found.decode_use]).all()


# Against the simulator.


def played(load: Demand, num_prefill: int, num_decode: int, seconds: float = 20.0) -> float:
    """Attainment of a short trace on real routing and admission."""
    rng = np.random.default_rng(1)
    num = int(load.rate_rps * seconds)
    arrivals_s = np.sort(rng.uniform(0.0, seconds, num))
    (kind_of_prompt,) = load.prompts
    outputs = np.maximum(rng.exponential(load.output_tokens, num).astype(int), 2)
    requests = tuple(
        TraceRequest(
            arrival_s=float(at_s), prompt_tokens=int(kind_of_prompt.new_tokens), output_tokens=int(output)
        )
        for at_s, output in zip(arrivals_s, outputs, strict=True)
    )
    group = WorkerGroup(
        shape="s",
        num_workers={Role.PREFILL: num_prefill, Role.DECODE: num_decode},
        step_time=dict.fromkeys(Role, H200_LLAMA_8B_FP8),
        worker=WorkerModelConfig(
            num_kv_blocks=40_000, block_size_tokens=16, max_num_seqs=256, max_num_batched_tokens=8192
        ),
        kv_bytes_per_token=65_536,
        link=KvLink(latency_s=0.002, bytes_per_s=40e9),
    )
    spec = ClusterSpec(
        groups=(group,),
        ttft_slo_s=TARGETS.ttft_s,
        tpot_slo_s=TARGETS.tpot_s,
        admission=AdmissionLimits(),
    )
    result = simulate(
        Trace(name="t", requests=requests),
        spec,
        make_policy=lambda seed: PredictivePolicy(random_seed=seed),
    )
    ttft_met, tpot_met = slo_met(result.requests, Slo(ttft_s=TARGETS.ttft_s, tpot_s=TARGETS.tpot_s))
    return float((ttft_met & tpot_met).mean())


def best(splits: Sequence[PlannedSplit], shares: Sequence[float]) -> PlannedSplit:
    return max(zip(shares, splits, strict=True), key=lambda pair: pair[0])[1]


CASES = {
    "prompts": demand(35.0, 3000, 60),
    "answers": demand(25.0, 400, 500),
    "both": demand(32.0, 3000, 300),
    "easy": demand(8.0, 2000, 200),
}


@pytest.mark.parametrize("load", CASES.values(), ids=CASES)
def test_the_split_that_is_predicted_best_is_about_the_best_there_is(load: Demand) -> None:
    splits = [split(num, 4 - num) for num in range(4)]
    simulated = [played(load, each.num_prefill, each.num_decode) for each in splits]
    predicted = [each.attainment for each in predict(load, *splits)]
    assert simulated[splits.index(best(splits, predicted))] >= max(simulated) - TOLERANCE
