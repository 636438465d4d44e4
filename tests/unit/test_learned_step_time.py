"""A step time learned from observations alone predicts what was not observed."""

from __future__ import annotations

import random
import time

import pytest

from core.learned_step_time import LearnedStepTime
from core.observed_steps import StepObservation
from core.performance_model import H200_LLAMA_8B_FP8, LinearStepTime, PrefillChunk
from core.step_times import StepTimes
from core.types import Role

SLOW_CPU = LinearStepTime(
    prefill_ms_per_token2=1e-5,
    prefill_ms_per_token=0.15,
    prefill_base_ms=9.0,
    decode_base_ms=4.0,
    decode_ms_per_seq=0.4,
    decode_ms_per_kv_token=0.0005,
)


def chunk(num_tokens: int, context_tokens: int = 0) -> PrefillChunk:
    return PrefillChunk(context_tokens=context_tokens, num_tokens=num_tokens, ends_prompt=True)


def observed(truth, rng: random.Random, *, with_prompts: bool, noise: float = 0.1) -> StepObservation:
    prefills = tuple(
        chunk(rng.randint(2, 3000), rng.randint(0, 2000)) for _ in range(rng.randint(1, 2) * with_prompts)
    )
    num_decoding = rng.randint(0 if with_prompts else 1, 40)
    kv_tokens = num_decoding * rng.randint(100, 3000)
    return StepObservation(
        prefills=prefills,
        num_decoding=num_decoding,
        decode_kv_tokens=kv_tokens,
        seconds=truth.step_s(prefills, num_decoding, kv_tokens) * rng.lognormvariate(0, noise),
    )


def learn(truth, num_steps: int, seed: int = 1, **kind) -> LearnedStepTime:
    rng, learned = random.Random(seed), LearnedStepTime()
    for _ in range(num_steps // 2):
        learned.observe_steps([observed(truth, rng, with_prompts=flag, **kind) for flag in (True, False)])
    return learned


@pytest.mark.parametrize("truth", [SLOW_CPU, H200_LLAMA_8B_FP8], ids=["cpu", "h200"])
def test_prompts_and_batches_are_predicted(truth) -> None:
    learned = learn(truth, 200)
    for num_tokens in (100, 1000, 3000):
        prompt = (chunk(num_tokens),)
        assert learned.step_s(prompt, 0, 0) == pytest.approx(truth.step_s(prompt, 0, 0), rel=0.2)
    for num_decoding in (1, 10, 40):
        kv_tokens = 1000 * num_decoding
        expected = truth.step_s((), num_decoding, kv_tokens)
        assert learned.step_s((), num_decoding, kv_tokens) == pytest.approx(expected, rel=0.15)


def test_nothing_is_predicted_from_steps_of_one_kind() -> None:
    rng, learned = random.Random(1), LearnedStepTime()
    for _ in range(50):
        learned.observe_steps([observed(SLOW_CPU, rng, with_prompts=False)])
    assert not learned.is_known
    with pytest.raises(ValueError, match="too few"):
        learned.step_s((), 1, 100)


def test_a_few_absurd_steps_do_not_count() -> None:
    rng, learned = random.Random(2), LearnedStepTime()
    for i in range(200):
        step = observed(SLOW_CPU, rng, with_prompts=i % 2 == 0)
        if i % 20 < 2:
            step = StepObservation(
                prefills=step.prefills,
                num_decoding=step.num_decoding,
                decode_kv_tokens=step.decode_kv_tokens,
                seconds=30.0 if i % 40 < 2 else 1e-6,
            )
        learned.observe_steps([step])
    expected = SLOW_CPU.step_s((), 10, 10_000)
    assert learned.step_s((), 10, 10_000) == pytest.approx(expected, rel=0.2)


def test_it_follows_a_change() -> None:
    rng, learned = random.Random(3), learn(SLOW_CPU, 400)
    for _ in range(80):
        learned.observe_steps([observed(H200_LLAMA_8B_FP8, rng, with_prompts=flag) for flag in (True, False)])
    expected = H200_LLAMA_8B_FP8.step_s((chunk(2000),), 0, 0)
    assert learned.step_s((chunk(2000),), 0, 0) == pytest.approx(expected, rel=0.2)


def test_learning_costs_little() -> None:
    rng = random.Random(4)
    steps = [observed(SLOW_CPU, rng, with_prompts=i % 2 == 0) for i in range(800)]
    learned = LearnedStepTime()
    began_s = time.process_time()
    for step in steps:
        learned.observe_steps([step])
    assert (time.process_time() - began_s) / len(steps) < 2e-3


def test_workers_without_a_profile_teach_each_other_in_either_role() -> None:
    rng, step_times = random.Random(5), StepTimes()
    assert step_times.of("s", Role.PREFILL) is None
    for _ in range(30):
        step_times.observe("s", Role.PREFILL, [observed(SLOW_CPU, rng, with_prompts=True)])
    assert step_times.of("s", Role.PREFILL) is None
    for _ in range(30):
        step_times.observe("s", Role.DECODE, [observed(SLOW_CPU, rng, with_prompts=False)])
    expected = SLOW_CPU.step_s((chunk(1000),), 0, 0)
    for role in Role:
        learned = step_times.of("s", role)
        assert learned is not None
        assert learned.step_s((chunk(1000),), 0, 0) == pytest.approx(expected, rel=0.2)
    assert step_times.of("other", Role.DECODE) is None
