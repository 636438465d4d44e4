"""Static plans: candidates, search and GPU counts on made-up scores; estimates and plans on small traces."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from core.errors import ConfigError
from core.performance_model import KvLink
from core.performance_profile import DecodePoint, PerformanceProfile, PrefillPoint
from deploy.plan_tables import plan_view
from simulator.planning.busiest_window import busiest_window
from simulator.planning.search import Evaluation, Score, SplitSearch, gpus_needed
from simulator.planning.slo_ceiling import slo_ceiling
from simulator.planning.split import Split, gpus_of, split_lines
from simulator.planning.split_estimate import SplitEstimate, SplitEstimator, cached_tokens
from simulator.planning.split_runs import SplitRuns
from simulator.planning.static_plan import StaticPlan, plan_static
from simulator.reports.summary import to_json
from simulator.result import Slo
from simulator.traces.trace import Trace, TraceRequest

SLO = Slo(ttft_s=0.5, tpot_s=0.03)


def profile_of(name: str = "tp1", num_gpus: int = 1, speed: float = 1.0) -> PerformanceProfile:
    """Prompts: 10 ms and 0.1 ms a token; decode steps: 5 ms, 0.2 ms a sequence, 0.1 us a KV token."""
    return PerformanceProfile(
        name=name,
        source="made up",
        model="m",
        accelerator="none",
        gpus_per_worker=num_gpus,
        kv_capacity_tokens=100_000,
        block_size_tokens=16,
        kv_bytes_per_token=1000,
        max_num_seqs=128,
        max_num_batched_tokens=4096,
        prefill=tuple(
            PrefillPoint(prompt_tokens=n, seconds=(0.010 + 1e-4 * n) / speed) for n in (100, 1000, 8000)
        ),
        decode=tuple(
            DecodePoint(num_decoding=n, kv_tokens=kv, seconds=(0.005 + 2e-4 * n + 1e-7 * kv) / speed)
            for n, kv in ((1, 100), (1, 10_000), (32, 10_000), (128, 90_000))
        ),
        link=KvLink(latency_s=0.001, bytes_per_s=1e10),
    )


TP1 = profile_of()
TP2 = profile_of("tp2", 2, 1.8)
TP4 = profile_of("tp4", 4, 3.0)
CPU = profile_of("cpu", 0)


def even_trace(
    num_requests: int, rate_rps: float, prompt_tokens: int = 1000, output_tokens: int = 20
) -> Trace:
    return Trace(
        name="even",
        requests=tuple(
            TraceRequest(arrival_s=n / rate_rps, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
            for n in range(num_requests)
        ),
    )


# ------------------------------------------------------------------------------------------ candidates


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.lists(st.sampled_from([TP1, TP2, TP4, CPU]), min_size=1, unique=True))
def test_no_worker_can_be_added_to_a_candidate_and_none_passes_the_budget(
    num_gpus: int, profiles: list[PerformanceProfile]
) -> None:
    splits = [split for line in split_lines(profiles, profiles, num_gpus) for split in line]
    assert len(splits) == len(set(splits))
    for split in splits:
        left = num_gpus - split.num_gpus
        assert 0 <= left < gpus_of(split.decode_profile)
        assert split.num_decode >= 1
        if split.num_prefill:
            assert left < gpus_of(split.prefill_profile)


def test_eight_gpus_of_one_kind_split_in_seven_ways_or_not_at_all() -> None:
    disaggregated, together = split_lines([TP1], [TP1], 8)
    assert [split.label for split in disaggregated] == [f"{n}P+{8 - n}D" for n in range(1, 8)]
    assert [split.label for split in together] == ["0P+8D"]


def test_tp_sizes_pair_and_are_named() -> None:
    labels = {split.label for line in split_lines([TP1, TP2], [TP2], 5) for split in line}
    assert labels == {"1P+2Dx2", "3P+1Dx2", "1Px2+1Dx2", "0P+2Dx2"}


def test_a_cpu_worker_counts_as_one() -> None:
    assert split_lines([CPU], [CPU], 2)[0][0].num_gpus == 2


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        ([], [TP1], "no prefill profile"),
        ([TP1], [], "no decode profile"),
        ([TP1, replace(TP2, name="tp1")], [TP1], "rename"),
        ([TP1], [replace(TP2, model="other")], "several models"),
        ([TP1], [replace(TP2, kv_bytes_per_token=1)], "kv_bytes_per_token"),
    ],
)
def test_profiles_that_do_not_go_together_are_refused(
    prefill: list[PerformanceProfile], decode: list[PerformanceProfile], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        split_lines(prefill, decode, 8)


# ---------------------------------------------------------------------------------------------- search


def score(attainment: float, slo_use: float = 0.5, goodput_rps: float = 1.0, ttft: float = 0.1) -> Score:
    return Score(
        attainment=attainment, goodput_rps=goodput_rps, ttft_p90_s=ttft, ttft_use=slo_use, tpot_use=0.1
    )


class Landscape:
    """A search over made-up attainments, with a record of what was asked."""

    def __init__(
        self,
        attainment: Callable[[Split], float],
        guess: Callable[[Split], float] = lambda split: 0.5,
        profiles: Sequence[PerformanceProfile] = (TP1,),
        use: Callable[[Split], float] = lambda split: 0.0,
    ) -> None:
        self.attainment = attainment
        self.batches: list[list[str]] = []
        self.search = SplitSearch(
            lambda num_gpus: split_lines(profiles, profiles, num_gpus),
            lambda split: SplitEstimate(
                attainment=guess(split), pressure=1, prefill_utilisation=use(split), decode_utilisation=0
            ),
            self.evaluate,
        )

    def evaluate(self, splits: Sequence[Split]) -> list[Evaluation]:
        self.batches.append([split.label for split in splits])
        return [Evaluation(score=score(self.attainment(split))) for split in splits]

    @property
    def num_evaluated(self) -> int:
        return sum(map(len, self.batches))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 80), st.floats(0, 1), st.floats(0, 1))
def test_on_a_hill_the_climb_finds_the_top_from_anywhere(num_gpus: int, top: float, start: float) -> None:
    def hill(at: float) -> Callable[[Split], float]:
        return lambda split: 0.9 - abs(split.num_prefill / num_gpus - at) if split.num_prefill else 0.0

    climbed, exhausted = Landscape(hill(top), hill(start)), Landscape(hill(top))
    found, best = climbed.search.climb(num_gpus), exhausted.search.exhaust(num_gpus)
    assert found is not None
    assert best is not None
    assert found.score == best.score
    assert climbed.num_evaluated <= exhausted.num_evaluated == num_gpus
    assert all(map(len, climbed.batches))


def test_a_good_estimate_saves_most_evaluations_and_each_has_its_reason() -> None:
    land = Landscape(
        lambda split: 1 - abs(split.num_prefill - 20) / 64, lambda split: -abs(split.num_prefill - 20)
    )
    found = land.search.climb(64)
    assert found is not None
    assert found.split.label == "20P+44D"
    assert land.num_evaluated < 12
    assert [tried.why for tried in land.search.tried][:4] == [
        "best estimate",
        "best estimate of its kind of workers",
        "3 prefill workers fewer than 20P+44D",
        "3 prefill workers more than 20P+44D",
    ]


def test_without_prefill_workers_may_be_best() -> None:
    land = Landscape(lambda split: 0.3 if split.num_prefill else 0.4)
    found = land.search.climb(8)
    assert found is not None
    assert found.split.num_prefill == 0


def test_one_tensor_parallel_size_may_beat_another() -> None:
    land = Landscape(
        lambda split: 0.8 if split.label == "2Px2+4D" else 0.1 * split.num_prefill / 8, profiles=[TP1, TP2]
    )
    found = land.search.exhaust(8)
    assert found is not None
    assert found.split.label == "2Px2+4D"


def test_nothing_is_evaluated_twice() -> None:
    land = Landscape(lambda split: 0.5)
    land.search.climb(8)
    before = land.num_evaluated
    land.search.climb(8)
    assert land.num_evaluated == before
    land.search.exhaust(8)
    assert land.num_evaluated == 8


def test_scores_rank_by_attainment_then_goodput_then_ttft() -> None:
    ranked = [
        score(0.5, goodput_rps=9),
        score(0.6, goodput_rps=1),
        score(0.6, goodput_rps=2, ttft=0.2, slo_use=0.1),
        score(0.6, goodput_rps=2, ttft=0.1, slo_use=9),
    ]
    assert sorted(ranked, key=lambda one: one.rank) == ranked


def test_among_splits_that_miss_nothing_the_one_with_most_headroom_is_best() -> None:
    assert score(1.0, slo_use=0.3, goodput_rps=1).rank > score(1.0, slo_use=0.4, goodput_rps=2).rank
    assert score(1.0, slo_use=0.9).rank > score(0.9999, slo_use=0.1, goodput_rps=9).rank


# ----------------------------------------------------------------------------------------- GPUs needed


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 128), st.integers(1, 128), st.floats(0.05, 1))
def test_the_fewest_gpus_are_found_whatever_the_estimate(enough: int, guessed: int, target: float) -> None:
    def attainment(need: int) -> Callable[[Split], float]:
        return lambda split: target if split.num_gpus >= need else target * split.num_gpus / (need + 1)

    land = Landscape(attainment(enough), attainment(guessed), use=lambda split: enough / split.num_gpus)
    assert gpus_needed(land.search, target, low=1, max_gpus=128).num_gpus == enough


def test_the_limit_of_gpus_is_named() -> None:
    land = Landscape(lambda split: split.num_gpus / 1000, use=lambda split: 2.0)
    needed = gpus_needed(land.search, 0.9, low=1, max_gpus=32)
    assert needed.num_gpus is None
    assert needed.best is not None
    assert needed.reason == "32 GPUs, the limit, attain 3.20 %"


def test_more_gpus_that_do_not_help_end_the_search() -> None:
    land = Landscape(lambda split: 0.7)
    needed = gpus_needed(land.search, 0.9, low=1, max_gpus=1024)
    assert needed.num_gpus is None
    assert needed.reason == "more GPUs do not help: 8 attain 70.00 %, 16 attain 70.00 %"


# ------------------------------------------------------------------------------- estimates and the ceiling


def test_a_light_load_is_estimated_to_meet_everything() -> None:
    (line, _) = split_lines([TP1], [TP1], 4)
    estimate = SplitEstimator(even_trace(200, 2.0), SLO)(line[1])
    assert estimate.attainment == 1.0
    assert estimate.pressure < 1
    assert estimate.prefill_utilisation == pytest.approx(2.0 * 0.11 / 2, rel=0.05)


def test_estimates_show_which_side_is_short() -> None:
    short_answers = SplitEstimator(even_trace(400, 25.0, output_tokens=2), SLO)
    long_answers = SplitEstimator(even_trace(400, 10.0, prompt_tokens=50, output_tokens=800), SLO)
    (line, _) = split_lines([TP1], [TP1], 8)

    def best(estimator: SplitEstimator) -> int:
        return max(line, key=lambda split: estimator(split).rank).num_prefill

    assert best(short_answers) > 4 > best(long_answers)


def test_estimates_take_the_prefix_cache_into_account() -> None:
    request = TraceRequest(arrival_s=0.0, prompt_tokens=1024, output_tokens=2, block_hashes=(1, 2))
    trace = Trace(
        name="same", requests=(request, replace(request, arrival_s=1.0), replace(request, arrival_s=2.0))
    )
    assert cached_tokens(trace, 1, math.inf) == [0, 1023, 1023]
    assert cached_tokens(trace, 2, math.inf) == [0, 0, 1023]
    assert cached_tokens(trace, 1, 512) == [0, 0, 0]


def test_requests_that_miss_alone_are_told_apart() -> None:
    lengths = [(1000, 10), (8000, 10), (200_000, 10), (99_000, 2000)]
    requests = [TraceRequest(arrival_s=0, prompt_tokens=p, output_tokens=o) for p, o in lengths]
    ceiling = slo_ceiling(Trace(name="t", requests=tuple(requests)), SLO, [TP1], [TP1], overhead_s=0)
    assert (ceiling.attainment, ceiling.ttft_missed, ceiling.too_long) == (0.25, 0.25, 0.5)
    assert "75.00 % of requests miss the SLO alone (25.00 % prompt too long for TTFT" in ceiling.reason
    assert slo_ceiling(even_trace(5, 1), SLO, [TP1], [TP1], overhead_s=0).reason == ""


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 12_000), st.integers(1, 30)), min_size=1, max_size=12),
    st.floats(0.1, 5),
)
def test_no_simulation_beats_the_ceiling(lengths: list[tuple[int, int]], gap_s: float) -> None:
    requests = tuple(
        TraceRequest(arrival_s=n * gap_s, prompt_tokens=prompt, output_tokens=output)
        for n, (prompt, output) in enumerate(lengths)
    )
    trace = Trace(name="t", requests=requests)
    ceiling = slo_ceiling(trace, SLO, [TP1], [TP1], overhead_s=0.003)
    runs = SplitRuns(trace=trace, slo=SLO)
    for line in split_lines([TP1], [TP1], 4):
        for split in line:
            assert runs.run(split).score.attainment <= ceiling.attainment


def test_the_busiest_window_has_the_most_work() -> None:
    quiet = [TraceRequest(arrival_s=float(n), prompt_tokens=100, output_tokens=10) for n in range(300)]
    busy = [TraceRequest(arrival_s=100 + n / 2, prompt_tokens=4000, output_tokens=10) for n in range(100)]
    requests = tuple(sorted(quiet + busy, key=lambda request: request.arrival_s))
    start_s, end_s = busiest_window(Trace(name="t", requests=requests), 1, TP1, TP1)
    assert end_s - start_s == 60
    assert 90 <= start_s <= 101
    with pytest.raises(ConfigError, match="busiest window"):
        busiest_window(Trace(name="t", requests=requests), 0, TP1, TP1)


# --------------------------------------------------------------------------------------------- whole plans


def small_plan(**changes: object) -> StaticPlan:
    arguments: dict[str, object] = {"jobs": 1, "max_gpus": 12} | changes
    return plan_static(even_trace(150, 20.0), SLO, 6, [TP1], **arguments)  # type: ignore[arg-type]


def test_a_plan_finds_what_exhaustive_search_finds() -> None:
    lines: list[str] = []
    plan, exhaustive = small_plan(on_progress=lines.append), small_plan(exhaustive=True, targets=())
    assert plan.best.split == exhaustive.best.split
    assert plan.num_candidates == exhaustive.num_candidates == exhaustive.num_simulated == 6
    assert plan.num_simulated < 6 or plan.exhaustive
    assert len(lines) == len(plan.tried)
    for needed in plan.needed:
        assert needed.num_gpus is not None
        assert needed.best is not None
        assert needed.best.score.attainment >= needed.target
        assert needed.best.split.num_gpus <= needed.num_gpus


def test_plans_do_not_depend_on_the_number_of_processes() -> None:
    alone, two = small_plan(targets=()), small_plan(targets=(), jobs=2)
    assert to_json(alone.to_dict()) == to_json(two.to_dict())
    assert to_json(alone.to_dict()) == to_json(small_plan(targets=()).to_dict())


def test_targets_above_the_ceiling_are_called_unreachable_without_a_search() -> None:
    trace = even_trace(20, 1.0, prompt_tokens=9000)
    plan = plan_static(trace, SLO, 2, [TP1], jobs=1)
    assert [needed.num_gpus for needed in plan.needed] == [None] * 3
    assert "even an idle cluster misses: 100.00 %" in plan.needed[0].reason
    assert len(plan.tried) == plan.num_candidates


def test_a_plan_in_which_nothing_was_answered_is_json_all_the_same() -> None:
    plan = plan_static(even_trace(3, 1.0, prompt_tokens=200_000), SLO, 2, [TP1], jobs=1, targets=())
    assert json.loads(to_json(plan.to_dict()))["best"]["score"]["ttft_p90_s"] is None


def test_a_plan_of_the_busiest_minute_says_so() -> None:
    plan = plan_static(even_trace(200, 1.0), SLO, 2, [TP1], jobs=1, busiest_minutes=1, targets=())
    assert plan.window_s == (0.0, 60.0)
    assert plan.num_requests == 60


def test_the_tables_say_what_was_simulated_and_what_was_not() -> None:
    plan = small_plan()
    console = Console(file=io.StringIO(), width=140, record=True)
    console.print(plan_view(plan))
    text = console.export_text()
    assert f"best split of 6 GPUs: {plan.best.split.label}" in text
    assert f"{plan.num_simulated} of 6 splits were simulated" in text
    assert text.count("not simulated") == 6 - plan.num_simulated
    assert "GPUs needed" in text


@pytest.mark.parametrize(
    ("num_gpus", "changes", "message"),
    [
        (0, {}, "num_gpus must be at least 1"),
        (3, {"prefill_profiles": [TP4]}, "3 GPUs hold no split, the smallest takes 4"),
        (2, {"targets": (95,)}, "such as 0.95"),
        (8, {"max_gpus": 4}, "max_gpus"),
        (2, {"jobs": 0}, "jobs"),
        (2, {"slo": Slo(ttft_s=0, tpot_s=1)}, "slo.ttft_s"),
        (2, {"trace": Trace(name="none", requests=())}, "no request"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    num_gpus: int, changes: dict[str, object], message: str
) -> None:
    arguments = {"trace": even_trace(3, 1.0), "slo": SLO, "prefill_profiles": [TP1]} | changes
    with pytest.raises(ConfigError, match=message):
        plan_static(num_gpus=num_gpus, **arguments)  # type: ignore[arg-type]
