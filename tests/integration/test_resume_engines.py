"""Answers taken up by another real engine in the middle: exactly as one engine alone would have gone on."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import pytest
import pytest_asyncio
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from core.clock import MonotonicClock
from core.types import Role, Snapshot
from engine.base import EngineDelta, EngineRequest
from engine.vllm_codec import encode_options, encode_sampling_params
from router.cluster_view import ClusterView
from router.disaggregation import choose_path
from router.lap_context import RelayConfig
from router.policies import make_policy
from router.relay import Relay
from router.relay_request import RelayRequest
from router.sampling import facts_of
from router.trace import RequestTrace
from router.worker_link import WorkerLink
from tests.integration.vllm_workers import VllmWorker, next_id, vllm_worker

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

PROMPT = [300 + number * 7 % 900 for number in range(150)]
NUM_TOKENS = 40
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a", "b"],
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy with logprobs": {"temperature": 0.0, "logprobs": 3},
    "greedy with a repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.3},
    "greedy with a least length": {"temperature": 0.0, "min_tokens": 35, "ignore_eos": False},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.8, "frequency_penalty": 0.6},
    "a seed": {"temperature": 1.0, "seed": 7},
    "a seed, top-k and top-p": {"temperature": 0.9, "seed": 11, "top_k": 20, "top_p": 0.9},
    "a seed and penalties": {"temperature": 1.2, "seed": 3, "presence_penalty": 1.0},
    "a seed and logprobs": {"temperature": 1.0, "seed": 5, "logprobs": 2},
    "prompt logprobs": {"temperature": 0.0, "prompt_logprobs": 1},
    "a grammar": {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(json=SCHEMA)},
    "a grammar and a seed": {
        "temperature": 1.0,
        "seed": 9,
        "structured_outputs": StructuredOutputsParams(regex="[a-z]{8,30} [0-9]{8,20}"),
    },
    "a logit bias": {"temperature": 0.0, "logit_bias": {5: 2.0}},
}


@dataclass
class Collected:
    """An answer as a client's front end gets it."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    finish_reason: str | None = None

    def add(self, delta: EngineDelta) -> None:
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            assert len(delta.logprobs.token_ids) == len(delta.token_ids)
            self.logprobs += [round(float(row[0]), 3) for row in delta.logprobs.logprobs]
        if delta.prompt_logprobs is not None:
            self.num_prompt_logprobs += len(delta.prompt_logprobs.token_ids)
        assert self.finish_reason is None, "tokens after the end"
        self.finish_reason = delta.finish_reason


class Workers:
    """A prefill and two decode workers, and a relay in front of them."""

    def __init__(
        self, prefill: VllmWorker, decodes: list[VllmWorker], *, stall_timeout_s: float = 3.0
    ) -> None:
        self.prefill = prefill
        self.by_id = {worker.engine.info.incarnation: worker for worker in (prefill, *decodes)}
        self.decodes = decodes
        clock = MonotonicClock()
        self.view = ClusterView(
            lambda report, on_load: WorkerLink(report.address, next_id("router"), on_load), clock
        )
        config = RelayConfig(prefill_timeout_s=60.0, stall_timeout_s=stall_timeout_s, max_retries=6)
        self.relay = Relay(self.view, make_policy("least_load", random_seed=0), config, clock)
        reports = [prefill.report(Role.PREFILL), *(worker.report(Role.DECODE) for worker in decodes)]
        self.view.update(Snapshot(incarnation="r", epoch=1, workers=tuple(reports)))

    async def __aenter__(self) -> Workers:
        for member in self.view.members():
            assert await member.link.wait_up(30.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in self.view.members():
            await member.close()

    async def ask(self, params: SamplingParams, emit: Any) -> RequestTrace:
        facts = facts_of(params)
        request_id = next_id("q")
        trace = RequestTrace(
            request_id=request_id,
            model="tiny",
            adapter="",
            tenant="",
            prompt_tokens=len(PROMPT),
            received_at_s=self.relay.clock.now_s(),
            path=choose_path(facts),
        )
        request = RelayRequest(
            request_id=request_id,
            model="tiny",
            adapter="",
            tenant="",
            prompt_token_ids=PROMPT,
            params=params,
            options=encode_options(cache_salt=next_id("salt")),
            path=trace.path,
            depends_on_output_history=facts.depends_on_output_history,
        )
        async with asyncio.timeout(60):
            await self.relay.run(request, trace, emit)
        return trace

    async def alone(self, params: SamplingParams) -> Collected:
        """The answer of one engine, computed from nothing."""
        answer = Collected()
        request = EngineRequest(
            request_id=next_id("alone"),
            prompt_token_ids=PROMPT,
            max_tokens=params.max_tokens or 1,
            sampling_params=encode_sampling_params(params),
            options=encode_options(cache_salt=next_id("salt")),
        )
        async for delta in self.decodes[0].engine.generate(request):
            answer.add(delta)
        return answer


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(model_path: FilePath) -> AsyncIterator[Workers]:
    async with (
        vllm_worker("prefill", model_path) as prefill,
        vllm_worker("decode", model_path) as first,
        vllm_worker("decode", model_path) as second,
        Workers(prefill, [first, second]) as found,
    ):
        yield found


def sampling(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NUM_TOKENS, "ignore_eos": True, **changes})


@pytest.mark.parametrize("name", SAMPLING)
async def test_an_answer_that_moves_twice_is_the_answer_of_one_engine(name: str, workers: Workers) -> None:
    params = sampling(**SAMPLING[name])
    expected = await workers.alone(params)
    answer = Collected()
    moments = [len(expected.token_ids) // 4, len(expected.token_ids) // 2]

    def emit(delta: EngineDelta) -> None:
        answer.add(delta)
        if moments and len(answer.token_ids) >= moments[0] and delta.finish_reason is None:
            moments.pop(0)
            for member in workers.view.members():  # as a connection that breaks
                member.link._lose_all("cut by the test")

    trace = await workers.ask(params, emit)
    assert answer.token_ids == expected.token_ids
    assert answer.finish_reason == expected.finish_reason
    assert answer.num_prompt_logprobs == expected.num_prompt_logprobs
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=0.01)
    assert not moments
    assert len(trace.resumptions) >= 2
    for worker in workers.by_id.values():
        await worker.wait_empty()


async def test_an_engine_that_is_stopped_loses_its_answer_to_another_and_comes_back(workers: Workers) -> None:
    params = sampling(temperature=0.0, max_tokens=200)
    expected = await workers.alone(params)
    answer, stopped = Collected(), []

    def emit(delta: EngineDelta) -> None:
        answer.add(delta)
        if len(answer.token_ids) >= 20 and not stopped:
            busy = next(worker for worker in workers.decodes if worker.engine.load().num_decoding)
            stopped.append(busy)
            for process in busy.engine_processes:
                process.send_signal(signal.SIGSTOP)

    try:
        trace = await workers.ask(params, emit)
    finally:
        for process in stopped[0].engine_processes:
            process.send_signal(signal.SIGCONT)
    assert answer.token_ids == expected.token_ids
    assert trace.resumptions
    for worker in workers.by_id.values():
        await worker.wait_empty()
    assert (await workers.alone(params)).token_ids == expected.token_ids


async def test_an_engine_that_is_killed_loses_its_answers_to_the_others(workers: Workers) -> None:
    """Those under way, and those whose KV it has not pulled yet. One decode worker is gone afterwards."""
    every = [sampling(**changes) for changes in SAMPLING.values() if "seed" not in changes]
    expected = [(await workers.alone(params)).token_ids for params in every]
    begun, late = [Collected() for _ in every], [Collected() for _ in every]
    stopped: asyncio.Future[VllmWorker] = asyncio.get_running_loop().create_future()

    def emit_to(answer: Collected) -> Any:
        def emit(delta: EngineDelta) -> None:
            answer.add(delta)
            if not stopped.done() and sum(len(each.token_ids) for each in begun) >= 8 * len(begun):
                busy = max(workers.decodes, key=lambda worker: worker.engine.load().num_decoding)
                for process in busy.engine_processes:
                    process.suspend()
                stopped.set_result(busy)

        return emit

    async with Workers(workers.prefill, workers.decodes, stall_timeout_s=60.0) as patient:

        def ask_all(answers: list[Collected]) -> Any:
            return asyncio.gather(
                *(patient.ask(params, emit_to(answer)) for params, answer in zip(every, answers, strict=True))
            )

        first = asyncio.ensure_future(ask_all(begun))
        async with asyncio.timeout(60):
            busy = await stopped
            second = asyncio.ensure_future(ask_all(late))
            while not busy.engine.load().waiting_prefill_tokens:  # noqa: ASYNC110  no word when it gets one
                await asyncio.sleep(0.01)
        for process in busy.engine_processes:
            process.kill()
        traces = [*await first, *await second]
    assert [answer.token_ids for answer in begun] == expected
    assert [answer.token_ids for answer in late] == expected
    assert sum(len(trace.resumptions) for trace in traces) >= 2
    for worker in workers.by_id.values():
        if worker is not busy:
            await worker.wait_empty()
