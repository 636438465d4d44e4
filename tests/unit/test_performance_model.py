"""How long steps and transfers take."""

from __future__ import annotations

import pytest

from core.performance_model import H200_LLAMA_8B_FP8, KvLink, PrefillChunk, StepTime


class TestPerformanceModel:
    def test_chunks_of_a_prompt_add_up_to_the_whole(self) -> None:
        whole = PrefillChunk(context_tokens=0, num_tokens=5000, ends_prompt=True)
        parts = [
            PrefillChunk(context_tokens=0, num_tokens=2048, ends_prompt=False),
            PrefillChunk(context_tokens=2048, num_tokens=2048, ends_prompt=False),
            PrefillChunk(context_tokens=4096, num_tokens=904, ends_prompt=True),
        ]
        model = H200_LLAMA_8B_FP8
        extra_s = 2 * model.decode_base_ms / 1e3
        assert sum(model.step_s([part], 0, 0) for part in parts) == pytest.approx(
            model.step_s([whole], 0, 0) + extra_s
        )

    def test_the_named_profile_gives_its_published_fits(self) -> None:
        chunk = PrefillChunk(context_tokens=0, num_tokens=4000, ends_prompt=True)
        assert H200_LLAMA_8B_FP8.step_s([chunk], 0, 0) * 1e3 == pytest.approx(
            4.21e-7 * 4000**2 + 0.01518 * 4000 + 16.50
        )
        assert H200_LLAMA_8B_FP8.step_s([], 64, 100_000) * 1e3 == pytest.approx(
            4.677 + 0.03812 * 64 + 2.878e-5 * 100_000
        )

    def test_a_mixed_step_pays_one_constant(self) -> None:
        chunk = PrefillChunk(context_tokens=0, num_tokens=1000, ends_prompt=True)
        model = H200_LLAMA_8B_FP8
        apart_s = model.step_s([chunk], 0, 0) + model.step_s([], 8, 4000)
        assert model.step_s([chunk], 8, 4000) == pytest.approx(apart_s - model.decode_base_ms / 1e3)

    def test_decode_runs_end_when_the_same_steps_one_by_one_end(self) -> None:
        ends_s = H200_LLAMA_8B_FP8.decode_ends_s(1.0, 7, 1000, 50)
        assert ends_s == StepTime.decode_ends_s(H200_LLAMA_8B_FP8, 1.0, 7, 1000, 50)

    def test_a_transfer_takes_latency_and_bandwidth(self) -> None:
        assert KvLink(latency_s=0.001, bytes_per_s=1e9).transfer_s(500_000_000) == pytest.approx(0.501)
