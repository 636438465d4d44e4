"""Step times from measured points: exact at the points, sane between and beyond them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from core.performance_model import H200_LLAMA_8B_FP8, KvLink, PrefillChunk, StepTime
from core.performance_profile import DecodePoint, PerformanceProfile, PrefillPoint
from core.profile_fit import fit_linear, non_negative_least_squares
from core.table_step_time import TableStepTime
from simulator.profiles.files import packaged_profile, packaged_profiles

H200 = packaged_profile("h200-llama-3.1-8b-fp8-tp1")


def make_profile(
    prefill: Sequence[tuple[int, float]] = ((100, 0.02), (1000, 0.05), (10_000, 0.4)),
    decode: Sequence[tuple[int, int, float]] = ((1, 100, 0.005), (10, 5000, 0.007), (100, 50_000, 0.02)),
) -> PerformanceProfile:
    return PerformanceProfile(
        name="test",
        source="made up",
        model="m",
        accelerator="a",
        gpus_per_worker=1,
        kv_capacity_tokens=100_000,
        block_size_tokens=16,
        kv_bytes_per_token=1000,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        prefill=tuple(PrefillPoint(prompt_tokens=n, seconds=s) for n, s in prefill),
        decode=tuple(DecodePoint(num_decoding=b, kv_tokens=k, seconds=s) for b, k, s in decode),
        link=KvLink(latency_s=0.001, bytes_per_s=1e9),
    )


def prompt_s(step_time: StepTime, num_tokens: int, context_tokens: int = 0) -> float:
    chunk = PrefillChunk(
        context_tokens=context_tokens, num_tokens=num_tokens - context_tokens, ends_prompt=True
    )
    return step_time.step_s((chunk,), 0, 0)


seconds = st.floats(1e-4, 10.0)
profiles = st.builds(
    make_profile,
    prefill=st.lists(
        st.tuples(st.integers(1, 50_000), seconds), min_size=2, max_size=8, unique_by=lambda point: point[0]
    ),
    decode=st.lists(
        st.tuples(st.integers(1, 1000), st.integers(0, 1_000_000), seconds),
        min_size=2,
        max_size=12,
        unique_by=lambda point: point[:2],
    ),
)


class TestMeasuredPoints:
    @pytest.mark.parametrize("name", packaged_profiles())
    def test_every_packaged_point_is_reproduced(self, name: str) -> None:
        profile = packaged_profile(name)
        step_time = TableStepTime(profile)
        for prompt in profile.prefill:
            assert prompt_s(step_time, prompt.prompt_tokens) == pytest.approx(prompt.seconds, rel=1e-9)
        for step in profile.decode:
            assert step_time.step_s((), step.num_decoding, step.kv_tokens) == pytest.approx(
                step.seconds, rel=1e-9
            )

    @pytest.mark.parametrize("name", packaged_profiles())
    def test_a_point_left_out_is_predicted_by_the_others(self, name: str) -> None:
        profile = packaged_profile(name)
        errors = []
        for index in range(0, len(profile.decode), 5):
            left_out = profile.decode[index]
            others = profile.decode[:index] + profile.decode[index + 1 :]
            step_time = TableStepTime(replace(profile, decode=others))
            predicted_s = step_time.step_s((), left_out.num_decoding, left_out.kv_tokens)
            errors.append(abs(predicted_s / left_out.seconds - 1))
        assert np.median(errors) < 0.05
        assert max(errors) < 0.2

    def test_repeated_points_are_averaged(self) -> None:
        profile = make_profile(
            prefill=((100, 0.02), (1000, 0.05), (1000, 0.07)),
            decode=((1, 100, 0.005), (10, 5000, 0.008), (10, 5000, 0.008 * 1.21)),
        )
        assert prompt_s(TableStepTime(profile), 1000) == pytest.approx(0.06)
        assert TableStepTime(profile).step_s((), 10, 5000) == pytest.approx(0.008 * 1.1)

    def test_many_points_are_thinned_and_still_met(self) -> None:
        rng = np.random.default_rng(1)
        batches = rng.integers(1, 1000, 1500)
        kvs = rng.integers(1000, 1_000_000, 1500)
        times = 0.005 + 4e-5 * batches + 3e-8 * kvs
        points = list(zip(batches.tolist(), kvs.tolist(), times.tolist(), strict=True))
        step_time = TableStepTime(make_profile(decode=points))
        for batch, kv, time_s in points:
            assert step_time.step_s((), batch, kv) == pytest.approx(time_s, rel=0.01)

    def test_cached_prompts_inform_the_fit_only(self) -> None:
        cached = PrefillPoint(prompt_tokens=1000, context_tokens=900, seconds=0.025)
        uncached = make_profile()
        both = replace(uncached, prefill=(*uncached.prefill, cached))
        assert prompt_s(TableStepTime(both), 1000) == pytest.approx(0.05)
        assert prompt_s(TableStepTime(both), 500) != prompt_s(TableStepTime(uncached), 500)


class TestLaws:
    @given(profile=profiles, data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_decode_runs_end_when_the_same_steps_one_by_one_end(
        self, profile: PerformanceProfile, data: st.DataObject
    ) -> None:
        step_time = TableStepTime(profile)
        batch = data.draw(st.integers(1, 1200))
        kv_tokens = data.draw(st.integers(0, 1_200_000))
        num_steps = data.draw(st.integers(0, 300))
        ends_s = step_time.decode_ends_s(3.7, batch, kv_tokens, num_steps)
        assert ends_s == StepTime.decode_ends_s(step_time, 3.7, batch, kv_tokens, num_steps)

    @given(profile=profiles, lengths=st.lists(st.integers(0, 100_000), min_size=2, max_size=20))
    @settings(max_examples=60, deadline=None)
    def test_a_longer_prompt_is_never_faster(self, profile: PerformanceProfile, lengths: list[int]) -> None:
        step_time = TableStepTime(profile)
        times = [prompt_s(step_time, length) for length in sorted(lengths)]
        assert all(later >= earlier * (1 - 1e-12) for earlier, later in pairwise(times))

    @given(
        profile=profiles,
        context_tokens=st.integers(0, 100_000),
        num_tokens=st.integers(2, 100_000),
        ends_prompt=st.booleans(),
        batch=st.integers(0, 2000),
        kv_per_seq=st.integers(0, 2000),
    )
    @settings(max_examples=100, deadline=None)
    def test_every_step_takes_time_and_prompts_never_shorten_it(
        self,
        profile: PerformanceProfile,
        context_tokens: int,
        num_tokens: int,
        ends_prompt: bool,
        batch: int,
        kv_per_seq: int,
    ) -> None:
        step_time = TableStepTime(profile)
        chunk = PrefillChunk(context_tokens=context_tokens, num_tokens=num_tokens, ends_prompt=ends_prompt)
        decode_s = step_time.step_s((), batch, batch * kv_per_seq)
        mixed_s = step_time.step_s((chunk,), batch, batch * kv_per_seq)
        assert 0 < decode_s < math.inf
        assert 0 < mixed_s < math.inf
        if batch:
            assert mixed_s >= decode_s

    @given(cuts=st.lists(st.integers(1, 15_999), max_size=6, unique=True))
    @settings(deadline=None)
    def test_chunks_add_up_to_the_prompt(self, cuts: list[int]) -> None:
        step_time = TableStepTime(H200)
        edges = [0, *sorted(cuts), 16_000]
        chunks_s = [
            step_time.step_s(
                (PrefillChunk(context_tokens=low, num_tokens=high - low, ends_prompt=high == 16_000),), 0, 0
            )
            for low, high in pairwise(edges)
        ]
        constants_s = len(cuts) * step_time.step_s((), 0, 0)
        assert sum(chunks_s) == pytest.approx(prompt_s(step_time, 16_000) + constants_s)


class TestBeyondThePoints:
    @pytest.mark.parametrize("name", packaged_profiles())
    def test_twice_the_range_follows_the_fit(self, name: str) -> None:
        profile = packaged_profile(name)
        step_time, fit = TableStepTime(profile), fit_linear(profile)
        longest = max(point.prompt_tokens for point in profile.prefill)
        assert prompt_s(step_time, 2 * longest) == pytest.approx(
            prompt_s(fit.step_time, 2 * longest), rel=0.1
        )
        batch = 2 * max(point.num_decoding for point in profile.decode)
        kv_tokens = 2 * max(point.kv_tokens for point in profile.decode)
        assert step_time.step_s((), batch, kv_tokens) == pytest.approx(
            fit.step_time.step_s((), batch, kv_tokens), rel=0.2
        )

    @pytest.mark.parametrize("name", packaged_profiles())
    def test_nothing_jumps_at_the_edge(self, name: str) -> None:
        profile = packaged_profile(name)
        step_time = TableStepTime(profile)
        longest = max(point.prompt_tokens for point in profile.prefill)
        assert prompt_s(step_time, longest + 1) == pytest.approx(prompt_s(step_time, longest), rel=1e-3)
        batch = max(point.num_decoding for point in profile.decode)
        kv_tokens = max(point.kv_tokens for point in profile.decode)
        edge_s = step_time.step_s((), batch, kv_tokens)
        assert step_time.step_s((), batch + 1, kv_tokens) == pytest.approx(edge_s, rel=0.02)
        assert step_time.step_s((), batch, kv_tokens + 1) == pytest.approx(edge_s, rel=1e-3)

    def test_it_says_where_it_extrapolates(self) -> None:
        step_time = TableStepTime(make_profile())
        inside = PrefillChunk(context_tokens=5000, num_tokens=5000, ends_prompt=True)
        outside = PrefillChunk(context_tokens=5001, num_tokens=5000, ends_prompt=True)
        assert not step_time.is_extrapolated((inside,), 100, 50_000)
        assert step_time.is_extrapolated((inside, outside), 0, 0)
        assert step_time.is_extrapolated((), 101, 50_000)
        assert step_time.is_extrapolated((), 100, 50_001)


class TestFit:
    def test_a_linear_machine_is_found_again(self) -> None:
        profile = make_profile(
            prefill=[(n, 0.016 + 1.5e-5 * n + 4e-10 * n**2) for n in (100, 1000, 4000, 16_000)],
            decode=[(b, k, 0.005 + 4e-5 * b + 3e-8 * k) for b in (1, 64, 256) for k in (1000, 100_000)],
        )
        fit = fit_linear(profile)
        assert fit.step_time.prefill_base_ms == pytest.approx(16)
        assert fit.step_time.prefill_ms_per_token2 == pytest.approx(4e-7)
        assert fit.step_time.decode_ms_per_seq == pytest.approx(0.04)
        assert fit.step_time.decode_ms_per_kv_token == pytest.approx(3e-5)
        assert np.abs([*fit.prefill_errors, *fit.decode_errors]).max() < 1e-6

    @given(
        context_tokens=st.integers(0, 30_000),
        num_tokens=st.integers(2, 8192),
        ends_prompt=st.booleans(),
        batch=st.integers(0, 500),
        kv_tokens=st.integers(0, 200_000),
    )
    @settings(deadline=None)
    def test_a_linear_machine_is_linear_everywhere(
        self, context_tokens: int, num_tokens: int, ends_prompt: bool, batch: int, kv_tokens: int
    ) -> None:
        linear = H200_LLAMA_8B_FP8
        prompts = [
            PrefillChunk(context_tokens=0, num_tokens=n, ends_prompt=True) for n in range(100, 16_100, 1000)
        ]
        profile = make_profile(
            prefill=[(prompt.num_tokens, linear.step_s((prompt,), 0, 0)) for prompt in prompts],
            decode=[(b, k, linear.step_s((), b, k)) for b in (1, 64, 256) for k in (1000, 100_000)],
        )
        table = TableStepTime(profile)
        chunk = PrefillChunk(context_tokens=context_tokens, num_tokens=num_tokens, ends_prompt=ends_prompt)
        for prefills in ((), (chunk,), (chunk, chunk)):
            expected_s = linear.step_s(prefills, batch, kv_tokens if batch else 0)
            assert table.step_s(prefills, batch, kv_tokens) == pytest.approx(expected_s, rel=1e-3)

    def test_the_measured_profile_fits_as_published(self) -> None:
        fit = fit_linear(H200)
        assert fit.step_time.decode_base_ms == pytest.approx(4.677, rel=0.2)
        assert np.median(np.abs(fit.prefill_errors)) < 0.03
        assert np.median(np.abs(fit.decode_errors)) < 0.03

    @given(st.integers(0, 2**32 - 1))
    def test_no_non_negative_solution_is_better(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        matrix, target = rng.normal(size=(6, 3)), rng.normal(size=6)
        best = non_negative_least_squares(matrix, target)
        assert (best >= 0).all()
        best_error = np.sum((matrix @ best - target) ** 2)
        for other in np.abs(best + rng.normal(scale=0.3, size=(50, 3))):
            assert np.sum((matrix @ other - target) ** 2) >= best_error - 1e-9


class TestProfileChecks:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": ""}, "no name"),
            ({"prefill": ()}, "at least 2 lengths"),
            (
                {"decode": (DecodePoint(num_decoding=1, kv_tokens=1, seconds=1.0),)},
                "at least 2 decode points",
            ),
            ({"decode": (DecodePoint(num_decoding=0, kv_tokens=1, seconds=1.0),)}, "at least 1 sequence"),
            ({"prefill": (PrefillPoint(prompt_tokens=5, seconds=math.nan),)}, "took nan s"),
            ({"prefill": (PrefillPoint(prompt_tokens=5, context_tokens=5, seconds=1.0),)}, "context_tokens"),
            ({"kv_capacity_tokens": 15}, "must hold a block"),
            ({"gpus_per_worker": -1}, "gpus_per_worker"),
            ({"max_num_batched_tokens": 255}, "at least max_num_seqs"),
            ({"block_size_tokens": 0}, "block_size_tokens must be at least 1"),
            ({"startup_s": math.nan}, "startup_s"),
            ({"link": KvLink(latency_s=0.0, bytes_per_s=0.0)}, "positive bandwidth"),
        ],
    )
    def test_nonsense_is_refused(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            replace(make_profile(), **changes)  # type: ignore[arg-type]

    def test_a_profile_gives_the_limits_of_its_worker(self) -> None:
        config = H200.worker_model_config()
        assert config.num_kv_blocks == 945_029 // 16
        assert (config.max_num_seqs, config.max_num_batched_tokens) == (1024, 8192)
