"""The mock engine: the worker model in real time behind the engine interface."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import Any

import pytest

from core.errors import Draining, WorkerLost
from core.performance_model import KvLink, LinearStepTime
from core.types import WorkerLoad
from core.worker_events import WorkerModelConfig
from engine.base import Engine, EngineDelta, EngineRequest, KvParams
from engine.mock_engine import MockEngine, MockEngineConfig
from engine.mock_tokens import TokenSource, block_states
from kv_transfer import params as kv_keys

PROMPT = list(range(100, 140))
FIVE_MS = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.0,
    prefill_base_ms=5.0,
    decode_base_ms=5.0,
    decode_ms_per_seq=0.0,
    decode_ms_per_kv_token=0.0,
)
StartEngine = Callable[..., MockEngine]


@pytest.fixture
async def start_engine() -> AsyncIterator[StartEngine]:
    engines: list[MockEngine] = []

    def start(**changes: Any) -> MockEngine:
        settings: dict[str, Any] = {"incarnation": f"engine{len(engines)}", "time_scale": 0.0} | changes
        engines.append(MockEngine(MockEngineConfig(**settings)))
        return engines[-1]

    yield start
    for engine in engines:
        await engine.shutdown(0.0)


def request(
    request_id: str, prompt: list[int], max_tokens: int, kv_params: KvParams | None = None
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens, kv_params=kv_params
    )


async def read(engine: Engine, request: EngineRequest) -> list[EngineDelta]:
    return [delta async for delta in engine.generate(request)]


async def tokens(engine: Engine, request_id: str, prompt: list[int], max_tokens: int) -> list[int]:
    deltas = await read(engine, request(request_id, prompt, max_tokens))
    return [token for delta in deltas for token in delta.token_ids]


def started(
    engine: Engine, request: EngineRequest
) -> AbstractAsyncContextManager[AsyncIterator[EngineDelta]]:
    return contextlib.aclosing(engine.generate(request))  # type: ignore[type-var]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen within 5 s")


async def at_once(condition: Callable[[], bool]) -> None:
    """Waits without a timer: one of the engine's that was started meanwhile does not fire first."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen at once")


class TestTokens:
    async def test_a_request_gets_max_tokens_tokens_and_ends_with_length(
        self, start_engine: StartEngine
    ) -> None:
        deltas = await read(start_engine(), request("a", PROMPT, 7))
        assert sum(len(delta.token_ids) for delta in deltas) == 7
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
        assert all(1_000 <= token < 30_000 for delta in deltas for token in delta.token_ids)

    async def test_every_cut_of_a_run_goes_on_as_the_whole_run_did(self, start_engine: StartEngine) -> None:
        one, other = start_engine(), start_engine(worker=WorkerModelConfig(num_kv_blocks=500, max_num_seqs=3))
        whole = await tokens(one, "whole", PROMPT, 12)
        for num_before in range(1, 12):
            rest = await tokens(other, f"r{num_before}", PROMPT + whole[:num_before], 12 - num_before)
            assert whole[:num_before] + rest == whole

    async def test_a_changed_prompt_or_a_lost_token_changes_all_that_follows(
        self, start_engine: StartEngine
    ) -> None:
        engine = start_engine()
        whole = await tokens(engine, "whole", PROMPT, 10)
        changed = await tokens(engine, "changed", [PROMPT[0] + 1, *PROMPT[1:]], 10)
        lossy = await tokens(engine, "lossy", [*PROMPT, whole[0], whole[2]], 7)
        assert not set(whole) & set(changed)
        assert lossy != whole[3:]

    def test_a_long_prompt_is_folded_the_same_way_whatever_its_length(self) -> None:
        prompt = [(7 * i) % 50_000 for i in range(500)]
        whole = TokenSource(prompt, 1_000, 30_000).take(40)
        for num_before in range(40):
            rest = TokenSource(prompt + whole[:num_before], 1_000, 30_000).take(40 - num_before)
            assert rest == whole[num_before:]

    def test_a_block_state_depends_on_the_tokens_up_to_the_end_of_its_block(self) -> None:
        prompt = list(range(100))
        states = block_states(prompt, 16)
        assert len(states) == len(set(states)) == 6
        assert block_states(prompt[:40], 16) == states[:2]
        changed = block_states([*prompt[:40], 0, *prompt[41:]], 16)
        assert changed[:2] == states[:2]
        assert not set(changed[2:]) & set(states)

    async def test_a_context_overflow_is_refused_and_a_long_answer_is_cut_to_the_context(
        self, start_engine: StartEngine
    ) -> None:
        engine = start_engine(max_model_len=64)
        with pytest.raises(ValueError, match="context of 64"):
            await tokens(engine, "a", [1] * 64, 1)
        assert len(await tokens(engine, "b", [1] * 60, 100)) == 4

    async def test_many_streams_at_once_get_their_own_tokens(self, start_engine: StartEngine) -> None:
        engine = start_engine(decode_steps_per_wake=4)
        prompts = [[i, *PROMPT] for i in range(60)]
        results = await asyncio.gather(
            *[tokens(engine, f"r{i}", prompt, 20 + i) for i, prompt in enumerate(prompts)]
        )
        for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            assert result == TokenSource(prompt, 1_000, 30_000).take(20 + i)
        assert engine.load().kv_used_blocks == 0


class TestTime:
    async def test_steps_follow_each_other_at_the_modelled_pace(self, start_engine: StartEngine) -> None:
        engine = start_engine(time_scale=1.0, step_time=FIVE_MS)
        started_s = time.monotonic()
        times_s = [time.monotonic() async for _ in engine.generate(request("a", PROMPT, 40))]
        assert len(times_s) == 40
        assert times_s[-1] - started_s > 0.199
        assert statistics.median([after_s - before_s for before_s, after_s in pairwise(times_s)]) < 0.01

    async def test_time_scale_stretches_steps(self, start_engine: StartEngine) -> None:
        engine = start_engine(time_scale=4.0, step_time=FIVE_MS)
        started_s = time.monotonic()
        await read(engine, request("a", PROMPT, 5))
        assert time.monotonic() - started_s > 0.0999

    async def test_the_first_delta_says_what_was_cached_and_how_long_it_took(
        self, start_engine: StartEngine
    ) -> None:
        engine = start_engine(time_scale=1.0, step_time=FIVE_MS)
        began_s = time.monotonic()
        first, second = await read(engine, request("a", PROMPT, 2))
        took_s = time.monotonic() - began_s
        assert first.num_cached_tokens == 0
        assert first.queue_s is not None
        assert 0 <= first.queue_s < took_s - 0.009, "two steps are not in it"
        assert first.prefill_s == pytest.approx(0.005)
        assert (second.num_cached_tokens, second.queue_s, second.prefill_s) == (None, None, None)
        assert (await read(engine, request("b", PROMPT, 2)))[0].num_cached_tokens == 32

    async def test_free_steps_wait_for_a_reader(self, start_engine: StartEngine) -> None:
        engine = start_engine()
        async with started(engine, request("a", PROMPT, 1_000)) as deltas:
            assert len((await anext(deltas)).token_ids) == 1
            await asyncio.sleep(0.02)
            assert len((await anext(deltas)).token_ids) <= 2


class TestHandoff:
    async def test_prefilled_kv_is_pinned_pulled_and_released(self, start_engine: StartEngine) -> None:
        pulled: list[KvParams] = []
        prefill = start_engine()
        decode = start_engine(on_pulled=pulled.append)
        (delta,) = await read(prefill, request("p", PROMPT, 1, kv_keys.keep_for_pull()))
        pinned = kv_keys.pinned_kv(delta.kv_params)
        assert pinned is not None
        assert (pinned.engine_request_id, pinned.num_tokens, pinned.tp_size) == ("p", 40, 1)
        assert 25 < pinned.expires_at_s - time.monotonic() <= 30
        assert prefill.load().num_pinned == 1

        pull = kv_keys.pull(pinned.connector_params, pinned.expires_at_s)
        deltas = await read(decode, request("d", [*PROMPT, *delta.token_ids], 9, pull))
        rest = [token for delta in deltas for token in delta.token_ids]
        assert [*delta.token_ids, *rest] == await tokens(start_engine(), "whole", PROMPT, 10)
        assert deltas[0].num_cached_tokens == 40
        report = kv_keys.TransferReport.from_params(deltas[-1].kv_params)
        assert report is not None
        assert (report.outcome, report.num_bytes) == (kv_keys.Outcome.PULLED, 40 * 65_536)

        await prefill.release_kv([params["remote_request_id"] for params in pulled])
        assert prefill.load().kv_used_blocks == decode.load().kv_used_blocks == 0

    async def test_a_pull_takes_the_links_time(self, start_engine: StartEngine) -> None:
        engine = start_engine(
            time_scale=1.0,
            step_time=FIVE_MS,
            link=KvLink(latency_s=0.01, bytes_per_s=4e6),
            kv_bytes_per_token=10_000,
        )
        began_s = time.monotonic()
        first, *_, last = await read(engine, request("d", PROMPT, 3, pull_of(40)))
        took_s = time.monotonic() - began_s
        assert first.queue_s is not None
        assert 0.109 < first.queue_s < took_s - 0.014, "three steps are not in it"
        assert last.kv_params is not None
        assert last.kv_params["baton_transfer"]["pull_s"] == pytest.approx(0.11)

    @pytest.mark.parametrize("reason", ["pull_failed", "lease_over", "misfit"])
    async def test_kv_that_does_not_come_is_computed_and_the_tokens_are_the_same(
        self, start_engine: StartEngine, reason: str
    ) -> None:
        engine = start_engine()
        params = pull_of(40)
        if reason == "pull_failed":
            engine.fail_next_pull()
        elif reason == "lease_over":
            params["remote_blocks_expiry_time"] = time.monotonic()
        else:
            params["remote_host"] = "10.0.0.7"
        deltas = await read(engine, request("d", PROMPT, 3, params))
        report = kv_keys.TransferReport.from_params(deltas[-1].kv_params)
        assert report is not None
        assert (report.outcome, report.reason) == (kv_keys.Outcome.RECOMPUTED, reason)
        assert deltas[0].num_cached_tokens == 0
        whole = TokenSource(PROMPT, 1_000, 30_000).take(3)
        assert [token for delta in deltas for token in delta.token_ids] == whole

    async def test_an_extended_deadline_saves_a_slow_pull(self, start_engine: StartEngine) -> None:
        engine = start_engine(time_scale=1.0, link=KvLink(latency_s=0.2, bytes_per_s=1e12))
        params = pull_of(40) | {"remote_blocks_expiry_time": time.monotonic() + 0.1}
        reading = asyncio.create_task(read(engine, request("d", PROMPT, 1, params)))
        await at_once(lambda: engine.load().kv_used_blocks == 3)
        await engine.extend_kv_deadline("d", time.monotonic() + 10)
        report = kv_keys.TransferReport.from_params((await reading)[-1].kv_params)
        assert report is not None
        assert report.outcome is kv_keys.Outcome.PULLED

    async def test_cached_kv_is_not_pulled(self, start_engine: StartEngine) -> None:
        released: list[KvParams] = []
        engine = start_engine(on_pulled=released.append)
        await read(engine, request("warm", PROMPT, 10))
        deltas = await read(engine, request("d", [*PROMPT[:32], 1], 3, pull_of(32)))
        report = kv_keys.TransferReport.from_params(deltas[-1].kv_params)
        assert report is not None
        assert report.outcome is kv_keys.Outcome.CACHED
        assert [params["remote_request_id"] for params in released] == ["p"]

    async def test_leases_are_renewed_and_end(self, start_engine: StartEngine) -> None:
        engine = start_engine(worker=WorkerModelConfig(num_kv_blocks=100, lease_s=0.3))
        await read(engine, request("a", PROMPT, 1, kv_keys.keep_for_pull()))
        before_s = time.monotonic()
        ends_s = await engine.renew_kv(["a", "unknown"], 10.0)
        assert list(ends_s) == ["a"]
        assert before_s + 10.0 <= ends_s["a"] <= time.monotonic() + 10.0
        await read(engine, request("b", PROMPT, 1, kv_keys.keep_for_pull()))
        await until(lambda: engine.load().num_pinned == 1)
        await engine.release_kv(["a", "b", "unknown"])
        assert engine.load().kv_used_blocks == 0

    async def test_a_request_closed_while_it_pulls_frees_its_blocks_when_the_pull_ends(
        self, start_engine: StartEngine
    ) -> None:
        engine = start_engine(time_scale=1.0, link=KvLink(latency_s=0.2, bytes_per_s=1e12))

        async def load_once_closed() -> WorkerLoad:
            with contextlib.suppress(asyncio.CancelledError):
                await read(engine, request("d", PROMPT, 3, pull_of(40)))
            return engine.load()

        reading = asyncio.create_task(load_once_closed())
        await at_once(lambda: engine.load().kv_used_blocks == 3)
        reading.cancel()
        load = await reading
        assert load.num_waiting == 0
        assert load.kv_used_blocks == 3
        await until(lambda: engine.load().kv_used_blocks == 0)


def pull_of(num_tokens: int) -> KvParams:
    params = {
        "remote_request_id": "p",
        "remote_host": "mock",
        "remote_num_tokens": num_tokens,
        "remote_block_ids": [[0]],
        "tp_size": 1,
    }
    return kv_keys.pull(params, time.monotonic() + 30)


class TestEnds:
    async def test_closing_a_stream_aborts_it_and_frees_its_kv(self, start_engine: StartEngine) -> None:
        engine = start_engine(time_scale=1.0, step_time=FIVE_MS)
        async with started(engine, request("a", PROMPT, 1_000)) as deltas:
            await anext(deltas)
            assert engine.load().num_running == 1
        assert engine.load().num_running == 0
        assert engine.load().kv_used_blocks == 0

    async def test_cancelled_readers_leave_nothing_behind(self, start_engine: StartEngine) -> None:
        engine = start_engine(time_scale=0.2, worker=WorkerModelConfig(num_kv_blocks=200, max_num_seqs=8))
        tasks = [asyncio.create_task(tokens(engine, f"r{i}", [i, *PROMPT], 30)) for i in range(30)]
        for i, task in enumerate(tasks):
            if i % 3 == 0:
                await asyncio.sleep(0.001)
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for i, result in enumerate(results):
            if not isinstance(result, asyncio.CancelledError):
                assert result == TokenSource([i, *PROMPT], 1_000, 30_000).take(30)
        assert engine.load().kv_used_blocks == engine.load().num_running == engine.load().num_waiting == 0

    async def test_a_killed_engine_is_dead_and_its_streams_break(self, start_engine: StartEngine) -> None:
        engine = start_engine(time_scale=1.0, step_time=FIVE_MS)
        async with started(engine, request("a", PROMPT, 1_000)) as deltas:
            await anext(deltas)
            engine.kill()
            assert engine.dead
            with pytest.raises(WorkerLost):
                async for _ in deltas:
                    pass
        with pytest.raises(WorkerLost):
            await tokens(engine, "b", PROMPT, 1)

    async def test_a_hung_engine_goes_on_later(self, start_engine: StartEngine) -> None:
        engine = start_engine(time_scale=1.0, step_time=FIVE_MS)
        began_s = time.monotonic()
        async with started(engine, request("a", PROMPT, 3)) as deltas:
            await anext(deltas)
            engine.hang(0.1)
            assert (await anext(deltas)).finish_reason is None
            assert time.monotonic() - began_s > 0.109, "two steps and the hang"
            assert (await anext(deltas)).finish_reason == "length"

    async def test_an_idle_engine_can_hang_too(self, start_engine: StartEngine) -> None:
        engine = start_engine()
        hung_s = time.monotonic()
        engine.hang(0.05)
        await tokens(engine, "a", PROMPT, 2)
        assert time.monotonic() - hung_s > 0.049

    async def test_shutdown_lets_running_requests_finish_and_refuses_new_ones(
        self, start_engine: StartEngine
    ) -> None:
        engine = start_engine(time_scale=1.0, step_time=FIVE_MS)
        running = asyncio.create_task(tokens(engine, "a", PROMPT, 60))
        await asyncio.sleep(0.01)
        stopping = asyncio.create_task(engine.shutdown(30.0))
        await asyncio.sleep(0.01)
        with pytest.raises(Draining):
            await tokens(engine, "b", PROMPT, 1)
        assert len(await running) == 60
        await stopping
        assert engine.dead

    async def test_shutdown_does_not_wait_longer_than_told(self, start_engine: StartEngine) -> None:
        engine = start_engine(time_scale=1.0, step_time=FIVE_MS)
        running = asyncio.create_task(tokens(engine, "a", PROMPT, 10_000))
        await asyncio.sleep(0.01)
        started_s = time.monotonic()
        await engine.shutdown(0.05)
        assert time.monotonic() - started_s < 10  # of the request's 50
        with pytest.raises(WorkerLost):
            await running
