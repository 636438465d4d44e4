"""Planning and taking measurements of a worker, and the pace of padded engines."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError, WorkerLost
from core.performance_model import LinearStepTime, PrefillChunk
from core.performance_profile import DecodePoint, PrefillPoint, TransferPoint
from deploy.profiling import batch
from deploy.profiling.batch import decode_batch, step_seconds
from deploy.profiling.cluster_target import pick_workers, worker_limits
from deploy.profiling.command import make_profile
from deploy.profiling.link import DEFAULT_LINK, fit_link
from deploy.profiling.measure import Measurements, Measuring
from deploy.profiling.plan import GridSize, WorkerLimits, coarse_first, log_spaced, measurement_plan
from deploy.profiling.plot import plot_profile
from deploy.profiling.target import Prompts, TargetFacts
from engine.pacing import PaceConfig, Pacer, StepWork
from engine.step_reader import StepReader

STEP_TIME = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.01,
    prefill_base_ms=2.0,
    decode_base_ms=4.0,
    decode_ms_per_seq=0.5,
    decode_ms_per_kv_token=0.001,
)
LIMITS = WorkerLimits(
    max_model_len=2048,
    num_kv_blocks=512,
    block_size_tokens=16,
    kv_bytes_per_token=1024,
    max_num_seqs=16,
    max_num_batched_tokens=1024,
)
SMALL = GridSize(num_prompts=4, num_repeats=2, num_batches=2, num_contexts=2, num_steps=8, num_transfers=3)


class FakeTarget:
    """Steps of known length on a clock of its own; each sequence gets a token a step from the start."""

    def __init__(self, *, fails: bool = False) -> None:
        self.limits = LIMITS
        self.facts = TargetFacts(
            model="m", accelerator="A 1", gpus_per_worker=1, source="a test", startup_s=None
        )
        self.prompts: list[tuple[int, ...]] = []
        self.num_running = 0
        self.now_s = 0.0
        self.fails = fails
        self._step = asyncio.Event()
        self._clock = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(0.0005)
            self.now_s += STEP_TIME.step_s((), self.num_running, 0)
            step, self._step = self._step, asyncio.Event()
            step.set()

    async def prefill(self, prompt: list[int]) -> float:
        self.prompts.append(tuple(prompt))
        chunk = PrefillChunk(context_tokens=0, num_tokens=len(prompt), ends_prompt=True)
        return STEP_TIME.step_s((chunk,), 0, 0)

    async def decode(self, prompt: list[int], max_tokens: int) -> AsyncGenerator[int, None]:
        self.prompts.append(tuple(prompt))
        self.num_running += 1
        try:
            for _ in range(max_tokens):
                await self._step.wait()
                if self.fails:
                    raise WorkerLost("gone")
                yield 1
        finally:
            await asyncio.sleep(0.01)  # an abort takes its time
            self.num_running -= 1

    async def transfer(self, prompt: list[int]) -> TransferPoint | None:
        num_bytes = len(prompt) * self.limits.kv_bytes_per_token
        return TransferPoint(num_bytes=num_bytes, seconds=0.001 + num_bytes / 1e9)

    async def close(self) -> None:
        self._clock.cancel()
        await asyncio.gather(self._clock, return_exceptions=True)


MakeTarget = Callable[..., FakeTarget]


@pytest.fixture
def fake_target(monkeypatch: pytest.MonkeyPatch) -> MakeTarget:
    """Makes a target whose clock is the one that measures tokens."""

    def make(*, fails: bool = False) -> FakeTarget:
        target = FakeTarget(fails=fails)
        monkeypatch.setattr(batch, "time", SimpleNamespace(monotonic=lambda: target.now_s))
        return target

    return make


async def measure(target: FakeTarget, *, budget_s: float = 60.0) -> Measurements:
    plan = measurement_plan(target.limits, SMALL)
    try:
        return await Measuring(
            target, plan, budget_s=budget_s, on_progress=lambda share, what: None, prompts=Prompts(seed=1)
        ).run()
    finally:
        await target.close()


# Planning.


@st.composite
def limits_of_workers(draw: st.DrawFn) -> WorkerLimits:
    max_num_seqs = draw(st.integers(1, 512))
    return WorkerLimits(
        max_model_len=draw(st.integers(128, 200_000)),
        num_kv_blocks=draw(st.integers(64, 60_000)),
        block_size_tokens=draw(st.sampled_from((8, 16, 128))),
        kv_bytes_per_token=1024,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 16_384)),
    )


@given(limits=limits_of_workers())
def test_nothing_planned_exceeds_the_workers_limits(limits: WorkerLimits) -> None:
    plan = measurement_plan(limits, GridSize())

    assert plan.decodes
    for num_tokens in (*plan.prompt_tokens, *plan.transfer_tokens):
        assert 1 <= num_tokens < min(limits.max_model_len, limits.kv_capacity_tokens)
    for task in plan.decodes:
        longest = task.prompt_tokens + task.max_tokens
        blocks = task.num_decoding * -(-longest // limits.block_size_tokens)
        assert 1 <= task.num_decoding <= limits.max_num_seqs
        assert longest <= limits.max_model_len
        assert blocks <= limits.num_kv_blocks
        assert task.max_tokens > task.num_steps


def test_the_first_points_of_a_plan_span_its_range() -> None:
    plan = measurement_plan(LIMITS, GridSize())

    assert {min(plan.prompt_tokens), max(plan.prompt_tokens)} == set(plan.prompt_tokens[:2])
    corners = plan.decodes[:4]
    assert {task.num_decoding for task in corners} == {1, LIMITS.max_num_seqs}
    assert len(set(plan.decodes)) == len(plan.decodes)


@given(low=st.integers(1, 1000), more=st.integers(0, 10**6), num=st.integers(2, 20))
def test_coarse_first_keeps_every_number_once(low: int, more: int, num: int) -> None:
    values = log_spaced(low, low + more, num)

    assert sorted(coarse_first(values)) == values
    assert values[0] >= low
    assert values[-1] == low + more


def test_a_worker_too_small_to_be_measured_is_refused() -> None:
    limits = WorkerLimits(
        max_model_len=32,
        num_kv_blocks=4,
        block_size_tokens=16,
        kv_bytes_per_token=1,
        max_num_seqs=1,
        max_num_batched_tokens=32,
    )
    with pytest.raises(ConfigError, match="too small to be measured"):
        measurement_plan(limits, GridSize())


# Measuring.


async def test_measured_points_are_those_of_the_worker(fake_target: MakeTarget) -> None:
    target = fake_target()

    measured = await measure(target)

    assert measured.num_skipped == 0
    for prompt in measured.prefill:
        assert prompt.seconds == pytest.approx((4.0 + 0.01 * prompt.prompt_tokens) / 1e3)
    for step in measured.decode:
        assert step.seconds == pytest.approx(STEP_TIME.step_s((), step.num_decoding, 0), rel=1e-6)
    assert {step.num_decoding for step in measured.decode} == {1, LIMITS.max_num_seqs}
    assert target.num_running == 0


async def test_no_prompt_is_measured_twice(fake_target: MakeTarget) -> None:
    target = fake_target()

    await measure(target)

    starts = [prompt[:16] for prompt in target.prompts]
    assert len(set(starts)) == len(starts)


async def test_a_spent_budget_leaves_the_required_points(fake_target: MakeTarget) -> None:
    measured = await measure(fake_target(), budget_s=1e-6)

    assert len(measured.prefill) == 4
    assert len(measured.decode) == 4


async def test_kv_of_a_batch_is_counted_in_the_middle_of_what_was_measured(fake_target: MakeTarget) -> None:
    target = fake_target()

    point = await decode_batch(target, [[1] * 100], max_tokens=40, num_steps=20)
    await target.close()

    assert point is not None
    # From the arrival of token 2 to that of token 22: the steps find 101 to 120 tokens of KV.
    assert point.kv_tokens == pytest.approx(110.5, abs=1)


async def test_a_batch_that_ends_too_early_gives_no_point(fake_target: MakeTarget) -> None:
    target = fake_target()

    assert await decode_batch(target, [[1], [2]], max_tokens=4, num_steps=20) is None
    await target.close()


async def test_a_worker_that_dies_ends_the_measuring(fake_target: MakeTarget) -> None:
    with pytest.raises(WorkerLost, match="gone"):
        await measure(fake_target(fails=True))


def test_a_hiccup_and_paired_tokens_do_not_change_the_step_time() -> None:
    pairs = [(0.01 * tokens, tokens) for tokens in range(2, 42, 2)]
    hiccup = [(time_s + (0.5 if tokens > 37 else 0.0), tokens) for time_s, tokens in pairs]

    assert step_seconds(pairs) == pytest.approx(0.01)
    assert step_seconds(hiccup) == pytest.approx(0.01)


@given(latency_s=st.floats(1e-5, 0.1), bytes_per_s=st.floats(1e6, 1e12))
def test_the_link_is_found_again_from_its_pulls(latency_s: float, bytes_per_s: float) -> None:
    sizes = [int(bytes_per_s * latency_s * share) + 1000 for share in (0.1, 1, 10)]
    points = [TransferPoint(num_bytes=size, seconds=latency_s + size / bytes_per_s) for size in sizes]

    link = fit_link(points)

    assert [link.transfer_s(size) for size in sizes] == pytest.approx([p.seconds for p in points], rel=1e-3)


def test_a_link_without_pulls_or_of_one_size_still_makes_sense() -> None:
    assert fit_link([]) is DEFAULT_LINK
    link = fit_link([TransferPoint(num_bytes=1000, seconds=0.5)])
    assert link.latency_s == 0.0
    assert link.bytes_per_s == pytest.approx(2000.0)
    flat = fit_link([TransferPoint(num_bytes=size, seconds=0.003) for size in (10**6, 4 * 10**6, 2 * 10**6)])
    assert flat.latency_s == pytest.approx(0.003)
    assert flat.transfer_s(4 * 10**6) == pytest.approx(0.003, rel=0.06)


# Profile and plot.


async def test_a_profile_says_what_was_not_measured(tmp_path: Path, fake_target: MakeTarget) -> None:
    target = fake_target()
    measured = Measurements(
        prefill=tuple(PrefillPoint(prompt_tokens=n, seconds=0.01 + n * 1e-5) for n in (900, 30, 200)),
        decode=tuple(
            DecodePoint(num_decoding=b, kv_tokens=b * kv, seconds=0.004 + 1e-4 * b + 1e-7 * b * kv)
            for b, kv in itertools.product((8, 1), (500, 50))
        ),
        transfers=(),
        num_skipped=0,
    )

    profile = make_profile(target, measured, None, "big")
    plot_profile(profile, tmp_path / "out.png")
    await target.close()

    assert profile.name == "m-big-a-1"
    assert profile.source == "a test; KV link not measured; start-up not measured"
    assert [point.prompt_tokens for point in profile.prefill] == [30, 200, 900]
    assert profile.link is DEFAULT_LINK
    assert (tmp_path / "out.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match=r"must end in one of \.png"):
        plot_profile(profile, tmp_path / "out.doc")


# Choosing a worker of a running cluster.


def seen(worker_id: str, **changes: object) -> dict[str, object]:
    worker = {
        "worker_id": worker_id,
        "shape": "a",
        "role": "prefill",
        "state": "ready",
        "num_requests": 0,
        "num_pinned": 0,
    }
    return worker | changes


def test_an_idle_decode_worker_is_measured_and_pulls_from_a_prefill_worker() -> None:
    workers = [
        seen("p"),
        seen("d0", role="decode", num_requests=1),
        seen("d1", role="decode"),
        seen("x", state="draining"),
    ]

    worker, peer = pick_workers(workers, None)

    assert worker["worker_id"] == "d1"
    assert peer is not None
    assert peer["worker_id"] == "p"


@pytest.mark.parametrize(
    ("workers", "shape", "message"),
    [
        ([], None, "no worker is ready"),
        ([seen("w")], "b", "no worker of shape 'b' is ready; there are: a"),
        ([seen("w"), seen("v", shape="b")], None, "name one of the shapes: a, b"),
        ([seen("w", num_requests=2)], None, "every worker is busy"),
    ],
)
def test_a_cluster_without_a_worker_to_measure_is_refused(
    workers: list[dict[str, object]], shape: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pick_workers(workers, shape)


def test_a_router_that_keeps_limits_to_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not give bytes_per_block, max_num_batched_tokens"):
        worker_limits(seen("w", num_kv_blocks=9, block_size_tokens=16, max_num_seqs=4), 2048)


# Paced engines.


def test_a_step_lasts_as_long_as_the_longest_of_its_reasons() -> None:
    options = {"baton_pace_factor": 4.0, "baton_pace_min_step_ms": 5, "baton_pace_decode_base_ms": 20.0}
    pace = PaceConfig.from_options({"gdn_prefill_backend": "x", **options})

    assert pace.step_s(StepWork(num_decoding=1), cpu_s=0.001) == pytest.approx(0.020)
    assert pace.step_s(StepWork(num_decoding=1), cpu_s=0.010) == pytest.approx(0.040)
    only_least = PaceConfig.from_options({"baton_pace_min_step_ms": 5})
    assert only_least.step_s(StepWork(), cpu_s=1.0) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sets no pace"),
        ({"baton_pace_decode_base_ms": 0}, "sets no pace"),
        ({"baton_pace_factor": 0.5}, "must be 1 or more"),
        ({"baton_pace_factor": "4"}, "must be a number of 0 or more, not '4'"),
        ({"baton_pace_min_step_ms": -1}, "must be a number of 0 or more"),
        ({"baton_pace_speed": 3}, "no key baton_pace_speed"),
    ],
)
def test_a_wrong_pace_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaceConfig.from_options(options)


@given(
    steps=st.lists(
        st.tuples(st.floats(0, 0.04), st.floats(0, 0.02), st.floats(0, 0.01)), min_size=1, max_size=30
    )
)
def test_steps_that_go_on_keep_the_beat_unless_they_are_late(steps: list[tuple[float, float, float]]) -> None:
    """Of each step: the time it takes to compute, the scheduling before it, and how late sleep ends."""
    pacer = Pacer(PaceConfig(min_step_ms=25.0))
    now_s = due_s = 100.0
    for index, (compute_s, schedule_s, oversleep_s) in enumerate(steps):
        now_s += schedule_s if index else 0.0
        late_before = pacer.num_late
        pacer.begin(now_s, goes_on=index > 0)
        now_s += compute_s
        sleep_s = pacer.end(now_s, StepWork(), cpu_s=0.0)
        due_s += 0.025
        if pacer.num_late > late_before:
            assert sleep_s == 0
            assert now_s > due_s
            due_s = now_s
        assert now_s + sleep_s == pytest.approx(due_s)
        now_s += sleep_s + (oversleep_s if sleep_s else 0.0)


def test_a_step_after_idle_time_starts_when_it_starts() -> None:
    pacer = Pacer(PaceConfig(min_step_ms=25.0))
    pacer.begin(10.0, goes_on=False)
    assert pacer.end(10.001, StepWork(), 0.0) == pytest.approx(0.024)

    pacer.begin(10.030, goes_on=False)
    assert pacer.end(10.031, StepWork(), 0.0) == pytest.approx(0.024)
    pacer.begin(15.0, goes_on=True)  # resumed long after
    assert pacer.end(15.001, StepWork(), 0.0) == pytest.approx(0.024)


def scheduled(
    new: Sequence[tuple[str, int, int, int]] = (),
    cached: Sequence[tuple[str, int, int, int]] = (),
    finished: Sequence[str] = (),
) -> Any:
    """New requests as (id, prompt, computed, scheduled), cached as (id, computed, output, scheduled)."""
    counts = {r[0]: r[3] for r in (*new, *cached)}
    return SimpleNamespace(
        finished_req_ids=set(finished),
        total_num_scheduled_tokens=sum(counts.values()),
        num_scheduled_tokens=counts,
        scheduled_new_reqs=[
            SimpleNamespace(req_id=r[0], prompt_token_ids=[0] * r[1], num_computed_tokens=r[2]) for r in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[r[0] for r in cached],
            num_computed_tokens=[r[1] for r in cached],
            num_output_tokens=[r[2] for r in cached],
        ),
    )


def test_chunks_decodes_and_empty_steps_are_told_apart() -> None:
    reader = StepReader()

    assert reader.read(scheduled()) is None
    first = reader.read(scheduled(new=[("a", 100, 16, 50)]))
    second = reader.read(scheduled(new=[("b", 30, 29, 1)], cached=[("a", 66, 0, 34)]))
    third = reader.read(scheduled(cached=[("a", 100, 1, 1), ("b", 30, 1, 1)]))

    assert first == StepWork(prefills=(PrefillChunk(context_tokens=16, num_tokens=50, ends_prompt=False),))
    assert second == StepWork(
        prefills=(PrefillChunk(context_tokens=66, num_tokens=34, ends_prompt=True),),
        num_decoding=1,
        decode_kv_tokens=29,
    )
    assert third == StepWork(num_decoding=2, decode_kv_tokens=130)
    assert reader.read(scheduled(finished=["a", "b"])) is None
