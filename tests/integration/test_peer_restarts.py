"""Workers come and go; what a decode engine remembers of those that are gone does not add up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kv_transfer.params import Outcome, pull
from kv_transfer.peer import KvPeerAddress
from tests.integration import prompts
from tests.integration.engine_process import ENVIRONMENT
from tests.integration.kv_peer import LINE, read_handshake
from tests.integration.server_process import HOST
from tests.integration.vllm_workers import VllmWorker, greedy, next_id, reference, run, vllm_worker

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

NUM_RESTARTS = 100
PEER_BLOCKS = 65536
"""As many blocks as the cache of a GPU has."""
MAX_GROWTH_BYTES = 24 << 20
"""A quarter of a MiB a peer."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(model_path: Path) -> AsyncIterator[tuple[VllmWorker, VllmWorker]]:
    async with vllm_worker("prefill", model_path) as prefill, vllm_worker("decode", model_path) as decode:
        yield prefill, decode


class Peers:
    """Starts peers; see kv_peer. One is always in the making, as starting them takes longer than a pull."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._pids: list[int] = []

    def order(self, line: str = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def next(self) -> dict[str, Any]:
        """The next one that was ordered."""
        about = await self.description()
        self._pids.append(about["pid"])
        return about

    def kill(self) -> None:
        """Every one that has been handed out."""
        while self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids.pop(), signal.SIGKILL)

    async def description(self) -> dict[str, Any]:
        """The next one; NIXL writes other lines to the same output."""
        assert self._process.stdout is not None
        while line := await asyncio.wait_for(self._process.stdout.readline(), 60):
            if line.startswith(LINE.encode()):
                return dict(json.loads(line.removeprefix(LINE.encode())))
        raise AssertionError("the peers' process ended")


@contextlib.asynccontextmanager
async def peers(*arguments: str) -> AsyncIterator[Peers]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.kv_peer", *arguments),
        cwd=Path(__file__).parents[2],
        env={**os.environ, **ENVIRONMENT},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    started = Peers(process)
    try:
        await started.description()
        yield started
    finally:
        started.kill()
        process.kill()
        await process.wait()


def address(about: dict[str, Any]) -> KvPeerAddress:
    return KvPeerAddress(about["engine_id"], HOST, about["port"], 1)


async def pull_from(decode: VllmWorker, peer: KvPeerAddress) -> None:
    """Three blocks of an empty cache; what is answered on top of them does not matter."""
    params = {
        "remote_block_ids": [[5, 6, 7]],
        "remote_engine_id": peer.engine_id,
        "remote_request_id": next_id("remote"),
        "remote_host": peer.host,
        "remote_port": peer.port,
        "tp_size": 1,
        "remote_num_tokens": 300,
    }
    prompt = prompts.tokens(300, next_id("restart"))
    answer, _ = await run(decode.engine, greedy(prompt, 2, pull(params, time.monotonic() + 30)))
    assert answer.report is not None
    assert answer.report.outcome is Outcome.PULLED, answer.report.reason


def check_flat(resident: list[int]) -> None:
    """Resident memory after every tenth restart; the first ten may still grow it."""
    print("resident MiB after every tenth restart:", [size >> 20 for size in resident])
    assert len(resident) == NUM_RESTARTS // 10 + 1
    assert max(resident[2:]) - resident[1] < MAX_GROWTH_BYTES


async def test_100_restarts_of_a_prefill_peer_leave_a_decode_engines_memory_flat(
    pair: tuple[VllmWorker, VllmWorker], tmp_path: Path
) -> None:
    prefill, decode = pair
    handshake = tmp_path / "handshake"
    handshake.write_bytes(await asyncio.to_thread(read_handshake, prefill.peer))
    resident = []
    async with peers(str(handshake), str(PEER_BLOCKS)) as restarted:
        restarted.order()
        for number in range(NUM_RESTARTS + 1):
            restarted.order()
            peer = address(await restarted.next())
            await decode.engine.connect_kv(peer.as_params())
            await pull_from(decode, peer)
            restarted.kill()
            assert await decode.engine.disconnect_kv([peer.engine_id]) == 0
            if number % 10 == 0:
                resident.append(decode.engine_processes[0].memory_info().rss)
    check_flat(resident)


@pytest.mark.endurance
@pytest.mark.timeout(1800)
async def test_100_restarts_of_a_real_prefill_engine_leave_a_decode_engines_memory_flat(
    pair: tuple[VllmWorker, VllmWorker], model_path: Path
) -> None:
    _, decode = pair
    resident = []
    async with peers("--engine", str(model_path)) as restarted:
        for number in range(NUM_RESTARTS + 1):
            prompt = prompts.tokens(300, next_id("real restart"))
            restarted.order(json.dumps(prompt))
            about = await restarted.next()
            await decode.engine.connect_kv(address(about).as_params())
            params = pull(about["connector_params"], about["expires_at_s"])
            answer, _ = await run(decode.engine, greedy([*prompt, about["first_token"]], 4, params))
            restarted.kill()
            assert await decode.engine.disconnect_kv([about["engine_id"]]) == 0
            assert answer.report is not None
            assert answer.report.outcome is Outcome.PULLED, answer.report.reason
            assert [about["first_token"], *answer.token_ids] == await reference(decode.engine, prompt, 5)
            if number % 10 == 0:
                resident.append(decode.engine_processes[0].memory_info().rss)
    check_flat(resident)


async def test_handoffs_are_right_after_all_those_restarts(pair: tuple[VllmWorker, VllmWorker]) -> None:
    """The first pull may find that UCX dropped the idle connection meanwhile: then it is recomputed."""
    prefill, decode = pair
    outcomes = []
    for number in range(3):
        prompt = prompts.tokens(300, f"after the restarts {number}")
        prefilled = await prefill.prefill(prompt)
        rest, transfer = await decode.decode([*prompt, prefilled.first_token], 8, prefilled.handle)
        outcomes.append((transfer.outcome, transfer.reason))
        assert [prefilled.first_token, *rest] == await reference(prefill.engine, prompt, 9)
    assert outcomes[-1] == (transfer.PULLED, "")
