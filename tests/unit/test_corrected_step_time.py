"""A profile that is off is put right by what is observed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.corrected_step_time import CorrectedStepTime, Phase
from core.errors import ConfigError
from core.performance_model import H200_LLAMA_8B_FP8, PrefillChunk, ScaledStepTime, StepTime

CHUNK = PrefillChunk(context_tokens=0, num_tokens=4000, ends_prompt=True)
ABSURD_S = (0.0, -1.0, math.nan, math.inf, 1e3, 1e-6)


def observe_noisily(
    corrected: CorrectedStepTime,
    real: StepTime,
    phase: Phase,
    num: int,
    *,
    seed: int = 0,
    absurd_every: int = 0,
) -> None:
    rng = np.random.default_rng(seed)
    for index in range(num):
        batch = int(rng.integers(1, 200))
        prefills = (CHUNK,) if phase == "prefill" else ()
        num_decoding = 0 if prefills else batch
        observed_s = real.step_s(prefills, num_decoding, 500 * num_decoding) * math.exp(0.2 * rng.normal())
        if absurd_every and index % absurd_every == 0:
            observed_s = ABSURD_S[index // absurd_every % len(ABSURD_S)]
        predicted_s = corrected.step_time.step_s(prefills, num_decoding, 500 * num_decoding)
        corrected.observe(phase=phase, predicted_s=predicted_s, observed_s=observed_s)


class TestCorrectedStepTime:
    def test_it_starts_uncorrected(self) -> None:
        corrected = CorrectedStepTime(H200_LLAMA_8B_FP8)
        assert corrected.step_s((CHUNK,), 10, 5000) == pytest.approx(
            H200_LLAMA_8B_FP8.step_s((CHUNK,), 10, 5000)
        )
        assert corrected.decode_ends_s(1.0, 10, 5000, 20) == H200_LLAMA_8B_FP8.decode_ends_s(
            1.0, 10, 5000, 20
        )

    @pytest.mark.parametrize("factor", [0.5, 2.0])
    @pytest.mark.parametrize("absurd_every", [0, 6])
    @pytest.mark.parametrize("seed", range(5))
    def test_a_factor_of_two_is_learnt_in_fifty_noisy_observations(
        self, factor: float, absurd_every: int, seed: int
    ) -> None:
        real = ScaledStepTime(step_time=H200_LLAMA_8B_FP8, factor=factor)
        corrected = CorrectedStepTime(H200_LLAMA_8B_FP8)
        for phase in ("prefill", "decode"):
            observe_noisily(corrected, real, phase, 50, seed=seed, absurd_every=absurd_every)
        for prefills, num_decoding in (((CHUNK,), 0), ((CHUNK,), 50), ((), 50)):
            step_s = corrected.step_s(prefills, num_decoding, 500 * num_decoding)
            assert step_s == pytest.approx(real.step_s(prefills, num_decoding, 500 * num_decoding), rel=0.15)

    def test_phases_learn_apart(self) -> None:
        corrected = CorrectedStepTime(H200_LLAMA_8B_FP8)
        for _ in range(20):
            corrected.observe(phase="decode", predicted_s=1.0, observed_s=3.0)
        assert (corrected.prefill_factor, corrected.decode_factor) == (1.0, 3.0)
        assert corrected.step_s((CHUNK,), 0, 0) == H200_LLAMA_8B_FP8.step_s((CHUNK,), 0, 0)

    def test_absurd_times_alone_change_nothing(self) -> None:
        corrected = CorrectedStepTime(H200_LLAMA_8B_FP8)
        for observed_s in (0.0, -1.0, math.nan, math.inf):
            for _ in range(50):
                corrected.observe(phase="decode", predicted_s=1.0, observed_s=observed_s)
                corrected.observe(phase="decode", predicted_s=observed_s, observed_s=1.0)
        assert corrected.decode_factor == 1.0

    def test_it_follows_a_lasting_change_within_two_half_lives(self) -> None:
        corrected = CorrectedStepTime(H200_LLAMA_8B_FP8, half_life=8)
        for observed_s in [1.0] * 100 + [2.0] * 16:
            corrected.observe(phase="prefill", predicted_s=1.0, observed_s=observed_s)
        assert corrected.prefill_factor == 2.0

    @given(
        factor=st.floats(0.1, 10.0),
        start_s=st.floats(0, 1e6),
        batch=st.integers(1, 1000),
        kv_tokens=st.integers(0, 10**6),
        num_steps=st.integers(0, 100),
    )
    def test_decode_runs_end_when_the_same_steps_one_by_one_end(
        self, factor: float, start_s: float, batch: int, kv_tokens: int, num_steps: int
    ) -> None:
        corrected = CorrectedStepTime(H200_LLAMA_8B_FP8)
        for _ in range(10):
            corrected.observe(phase="decode", predicted_s=1.0, observed_s=factor)
        ends_s = corrected.decode_ends_s(start_s, batch, kv_tokens, num_steps)
        assert ends_s == StepTime.decode_ends_s(corrected, start_s, batch, kv_tokens, num_steps)

    def test_a_half_life_of_nothing_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="half_life"):
            CorrectedStepTime(H200_LLAMA_8B_FP8, half_life=0)
