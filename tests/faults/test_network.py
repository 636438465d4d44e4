"""Row 16: the network between the nodes of a prefill and of a decode worker is slow, narrow or gone.

Routers reach both nodes all the while. KV, the handshake before it and the renewal of leases share the
disturbed way. A read that has begun cannot be taken back: what it asked for may come much later, so the
prompts are asked again once the network is whole, when everything that was held up has arrived.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path as FilePath

import pytest
import pytest_asyncio

from core.request import Path
from core.types import Role
from tests.faults import netns
from tests.faults.netns import WIRE, Direction, TwoNodes
from tests.faults.node_workers import Answer, RelayedWorkers, relayed_workers
from tests.faults.record import FaultReport
from tests.integration import prompts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(200),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(netns.why_not() is not None, reason=str(netns.why_not())),
]

LEASE_S = 5
LINK_DOWN_S = 20.0
ANSWERED_WITHIN_S = LEASE_S + 15.0
"""The lease bounds every pull; the rest is recomputing on a busy machine."""
EMPTY_WITHIN_S = 60.0
"""After the network is whole: TCP waits for longer and longer before it tries again."""
FULL_BYTES_PER_S = 20e6
FULL = Direction(bytes_per_s=FULL_BYTES_PER_S)
PROMPT_TOKENS, NUM_TOKENS = 900, 12
ROOM = {"kv_cache_memory_bytes": 128 << 20}
"""A request never waits for blocks."""
MIN_KV_BYTES = 7 << 20
"""Seven full blocks of the prompt."""

Network = tuple[TwoNodes, RelayedWorkers]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def network(fault_model: FilePath, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Network]:
    environment = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": WIRE}
    run_dir = tmp_path_factory.mktemp("nodes")
    with netns.two_nodes() as nodes:
        nodes.wire.set(FULL, FULL)
        placed = {Role.PREFILL: nodes.first, Role.DECODE: nodes.second}
        async with relayed_workers(
            placed, fault_model, run_dir, environment, lease_s=LEASE_S, **ROOM
        ) as workers:
            yield nodes, workers


async def ask(network: Network, seed: str) -> Answer:
    """One request whose answer has to be pulled; fails unless it is what one engine answers alone."""
    _, workers = network
    prompt = prompts.tokens(PROMPT_TOKENS, seed)
    expected = await workers.alone(prompt, NUM_TOKENS)
    answer = await asyncio.wait_for(workers.ask(prompt, NUM_TOKENS), ANSWERED_WITHIN_S)
    check(seed, answer, expected)
    return answer


def check(seed: str, answer: Answer, expected: list[int]) -> None:
    trace = answer.trace
    print(
        f"{seed}: {answer.took_s:.2f} s, {trace.kv_outcome} {trace.kv_reason}, "
        f"{trace.kv_bytes} bytes in {trace.kv_pull_s} s, {trace.fallbacks}"
    )
    assert answer.token_ids == expected, seed
    assert answer.finish_reason == "length"


async def until_kv_crosses(nodes: TwoNodes, since_bytes: int) -> None:
    """A read is under way, and far from its end."""
    async with asyncio.timeout(10):
        while nodes.second.received_bytes() < since_bytes + (1 << 20):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def until_pulls_work(network: Network, seed: str) -> float:
    """Seconds until a pull succeeds again."""
    since_s = time.monotonic()
    for attempt in range(40):
        if (await ask(network, f"{seed}, whole again {attempt}")).trace.kv_outcome == "pulled":
            return time.monotonic() - since_s
        await asyncio.sleep(0.5)
    raise AssertionError("no pull succeeds though the network is whole")


async def test_kv_crosses_the_network_between_the_nodes(network: Network, fault_report: FaultReport) -> None:
    nodes, workers = network
    await ask(network, "first contact")
    before = nodes.second.received_bytes()

    answer = await ask(network, "whole")

    crossed = nodes.second.received_bytes() - before
    assert answer.trace.path is Path.REMOTE_EARLY
    assert answer.trace.kv_outcome == "pulled"
    assert MIN_KV_BYTES <= answer.trace.kv_bytes <= crossed
    await workers.wait_empty(within_s=2)
    fault_report.record(
        row=16, what="network whole: the interface's counter shows the KV", crossed_bytes=crossed
    )


Disturb = Callable[[TwoNodes], Awaitable[None]]


async def slow(nodes: TwoNodes) -> None:
    there = Direction(delay_s=0.5, bytes_per_s=FULL_BYTES_PER_S)
    nodes.wire.set(there, there)


async def narrow(nodes: TwoNodes) -> None:
    there = Direction(bytes_per_s=FULL_BYTES_PER_S / 100)
    nodes.wire.set(there, there)


async def down(nodes: TwoNodes) -> None:
    nodes.second.set_link("down")
    await asyncio.sleep(LINK_DOWN_S)


async def deaf_prefill(nodes: TwoNodes) -> None:
    nodes.wire.set(FULL, Direction(lost=True))
    await asyncio.sleep(LEASE_S + 2)


async def deaf_decode(nodes: TwoNodes) -> None:
    nodes.wire.set(Direction(lost=True), FULL)
    await asyncio.sleep(LEASE_S + 2)


DISTURBANCES: dict[str, Disturb] = {
    "500 ms of delay each way": slow,
    "one hundredth of the bandwidth": narrow,
    "the link down for 20 s": down,
    "nothing arrives at the prefill node": deaf_prefill,
    "nothing arrives at the decode node": deaf_decode,
}


@pytest.mark.parametrize("what", DISTURBANCES)
async def test_requests_succeed_while_the_network_is_disturbed(
    what: str, network: Network, fault_report: FaultReport
) -> None:
    """One request is being pulled when it happens, others come while it lasts."""
    nodes, workers = network
    names = [f"{what} {number}" for number in range(4)]
    all_prompts = {name: prompts.tokens(PROMPT_TOKENS, name) for name in names}
    expected = {name: await workers.alone(prompt, NUM_TOKENS) for name, prompt in all_prompts.items()}

    async def asked(name: str) -> Answer:
        answer = await asyncio.wait_for(workers.ask(all_prompts[name], NUM_TOKENS), ANSWERED_WITHIN_S)
        check(name, answer, expected[name])
        return answer

    before = nodes.second.received_bytes()
    answers = [asyncio.create_task(asked(names[0]))]
    await until_kv_crosses(nodes, before)
    disturbing = asyncio.create_task(DISTURBANCES[what](nodes))
    for name in names[1:]:
        await asyncio.sleep(0.5)
        answers.append(asyncio.create_task(asked(name)))
    try:
        answered = await asyncio.gather(*answers)
        await disturbing
    finally:
        nodes.heal()
        nodes.wire.set(FULL, FULL)
    since_s = time.monotonic()
    pulls_after_s = await until_pulls_work(network, what)
    await workers.wait_empty(EMPTY_WITHIN_S)
    empty_after_s = time.monotonic() - since_s

    for name in names:  # from whatever was cached meanwhile
        check(f"{name}, again", await workers.ask(all_prompts[name], NUM_TOKENS), expected[name])
        check(
            f"{name}, locally", await workers.ask(all_prompts[name], NUM_TOKENS, Path.LOCAL), expected[name]
        )
    await workers.wait_empty(within_s=5)
    fault_report.record(
        row=16,
        what=what,
        served=len(answered),
        failed=0,
        wrong=0,
        outcomes=dict(Counter(f"{a.trace.kv_outcome} {a.trace.kv_reason}".strip() for a in answered)),
        slowest_s=round(max(answer.took_s for answer in answered), 2),
        pulls_after_s=round(pulls_after_s, 2),
        empty_after_s=round(empty_after_s, 2),
    )
