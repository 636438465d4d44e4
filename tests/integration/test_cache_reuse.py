"""A cluster reuses as much of its caches as one engine whose cache equals the prefill workers' together."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from vllm import SamplingParams

from core.clock import MonotonicClock
from core.performance_model import LinearStepTime
from core.request import Path as RequestPath
from core.step_times import StepTimes
from core.types import Role, Snapshot
from engine.base import EngineDelta
from router.cluster_view import ClusterView
from router.lap_context import RelayConfig
from router.policies import make_policy
from router.relay import Relay
from router.relay_request import RelayRequest
from router.trace import RequestTrace
from router.worker_link import WorkerLink
from tests.integration.prompts import tokens
from tests.integration.vllm_workers import VllmWorker, greedy, next_id, run, vllm_worker

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

BLOCK_TOKENS = 128
BLOCK_BYTES = BLOCK_TOKENS * 2 * 4 * 256 * 4
"""Keys and values in 4 layers, each 256 numbers of float32."""
WORKER_BLOCKS = 40
NUM_PREFILL = 2
POOL_BLOCKS = NUM_PREFILL * WORKER_BLOCKS
SYSTEM_BLOCKS, TURN_TOKENS, NUM_TURNS, ANSWER_TOKENS = 2, 180, 4, 6
SESSION_BLOCKS = NUM_TURNS * (TURN_TOKENS + ANSWER_TOKENS) // BLOCK_TOKENS
NUM_REQUESTS = 240
ENGINE = {"max_model_len": 2048, "max_num_batched_tokens": 2048}
STEP_TIME = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.15,
    prefill_base_ms=5.0,
    decode_base_ms=5.0,
    decode_ms_per_seq=0.5,
    decode_ms_per_kv_token=0.0,
)


@dataclass(frozen=True)
class Outcome:
    """Of one request."""

    token_ids: tuple[int, ...]
    cached_tokens: int


class Chats:
    """Sessions that share a system prompt; each goes on with what it was answered and in the end begins anew.

    Args:
        working_set: blocks of all sessions together, as a share of the prefill workers' caches.
    """

    def __init__(self, working_set: float) -> None:
        self._system = tokens(SYSTEM_BLOCKS * BLOCK_TOKENS, f"system {working_set}")
        self._num = round((working_set * POOL_BLOCKS - SYSTEM_BLOCKS) / SESSION_BLOCKS)
        self._seed = working_set
        self._said: dict[int, list[int]] = {}
        self._turns = dict.fromkeys(range(self._num), 0)

    def order(self) -> Iterator[int]:
        """Whose turn it is: some sessions come far more often than others."""
        source = random.Random(f"order {self._seed}")
        weights = [1 / (rank + 3) for rank in range(self._num)]
        return iter(source.choices(range(self._num), weights, k=NUM_REQUESTS))

    def prompt(self, session: int) -> list[int]:
        turn = self._turns[session]
        if turn == 0:
            self._said[session] = list(self._system)
        self._said[session] += tokens(TURN_TOKENS, f"session {self._seed} {session} {turn}")
        return list(self._said[session])

    def answered(self, session: int, token_ids: Sequence[int]) -> None:
        self._said[session] += token_ids
        self._turns[session] = (self._turns[session] + 1) % NUM_TURNS


class Cluster:
    """Workers behind gRPC and a relay, as a router holds them."""

    def __init__(self, prefills: Sequence[VllmWorker], decode: VllmWorker) -> None:
        clock = self._clock = MonotonicClock()
        self._workers = [(worker, Role.PREFILL) for worker in prefills] + [(decode, Role.DECODE)]
        self.view = ClusterView(
            lambda report, on_load: WorkerLink(report.address, "cluster", on_load),
            clock,
            StepTimes(lambda shape: STEP_TIME),
        )
        config = RelayConfig(prefill_timeout_s=60.0, stall_timeout_s=60.0)
        self._relay = Relay(self.view, make_policy("predictive", 1), config, clock)
        self._epoch = itertools.count(1)

    async def open(self) -> None:
        reports = tuple(worker.report(role) for worker, role in self._workers)
        self.view.update(Snapshot(incarnation="r", epoch=next(self._epoch), workers=reports))
        for member in self.view.members():
            assert await member.link.wait_up(10.0)

    async def close(self) -> None:
        for member in self.view.update(Snapshot(incarnation="r", epoch=next(self._epoch))):
            await member.close()

    async def ask(self, prompt: list[int]) -> tuple[Outcome, RequestTrace]:
        request_id = next_id("q")
        trace = RequestTrace(
            request_id=request_id,
            model="tiny",
            adapter="",
            tenant="",
            prompt_tokens=len(prompt),
            received_at_s=self._clock.now_s(),
            path=RequestPath.REMOTE_EARLY,
        )
        token_ids: list[int] = []

        def emit(delta: EngineDelta) -> None:
            token_ids.extend(delta.token_ids)

        await self._relay.run(
            RelayRequest(
                request_id=request_id,
                model="tiny",
                adapter="",
                tenant="",
                prompt_token_ids=prompt,
                params=SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True),
                options=b"",
                path=trace.path,
            ),
            trace,
            emit,
        )
        return Outcome(tuple(token_ids), trace.cached_tokens), trace


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_engine(model_path: Path) -> AsyncIterator[VllmWorker]:
    cache = POOL_BLOCKS * BLOCK_BYTES
    async with vllm_worker("one", model_path, kv_cache_memory_bytes=cache, **ENGINE) as worker:
        yield worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(model_path: Path) -> AsyncIterator[Cluster]:
    settings = {"kv_events": True, "kv_cache_memory_bytes": WORKER_BLOCKS * BLOCK_BYTES, **ENGINE}
    async with (
        vllm_worker("prefill", model_path, **settings) as first,
        vllm_worker("prefill", model_path, **settings) as second,
        vllm_worker("decode", model_path, **settings) as decode,
    ):
        cluster = Cluster([first, second], decode)
        await cluster.open()
        yield cluster
        await cluster.close()


@pytest.mark.parametrize("working_set", [0.5, 2.0])
async def test_as_much_is_cached_as_in_one_engine(
    cluster: Cluster, one_engine: VllmWorker, working_set: float
) -> None:
    alone, together = Chats(working_set), Chats(working_set)
    expected: list[Outcome] = []
    for session in alone.order():
        answer, _ = await run(one_engine.engine, greedy(alone.prompt(session), ANSWER_TOKENS))
        alone.answered(session, answer.token_ids)
        expected.append(Outcome(tuple(answer.token_ids), answer.cached_tokens))
    outcomes: list[Outcome] = []
    used: set[str] = set()
    prompt_tokens = 0
    for session in together.order():
        prompt = together.prompt(session)
        outcome, trace = await cluster.ask(prompt)
        together.answered(session, outcome.token_ids)
        outcomes.append(outcome)
        used.add(trace.prefill_worker)
        prompt_tokens += len(prompt)
    assert [outcome.token_ids for outcome in outcomes] == [outcome.token_ids for outcome in expected]
    cached, wanted = (sum(outcome.cached_tokens for outcome in each) for each in (outcomes, expected))
    print(
        f"working set {working_set:g} x the pool: {cached / prompt_tokens:.1%} of the prompt tokens cached, "
        f"{wanted / prompt_tokens:.1%} in one engine, prefill workers {sorted(used)}"
    )
    # 0.95 to 0.97 on an idle machine. On a busy one the router hears of evictions late: 0.945 has been seen.
    assert cached >= 0.93 * wanted
