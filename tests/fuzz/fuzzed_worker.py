"""One worker under fire: calls go in, then it has to be as if nothing had been."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import grpc
import msgspec

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens, unpack_tokens
from engine.gate import Gate
from router.worker_link import WorkerLink
from tests.fuzz.calls import ABORT, ATTACH, PREFILL, RELEASE, RESERVE, STREAMS, Call, failures_in, make
from tests.fuzz.engine_requests import REQUEST_IDS

PROMPT = list(range(300, 340))
NUM_TOKENS = 6
LINK = "a router that behaves"
_STEP_S = 0.005


class Worker(Protocol):
    """What tests/integration's workers have in common."""

    address: str
    engine: Any
    gate: Gate
    decode_leg: Any


class FuzzedWorker:
    """A worker, a client that sends it anything, and a router that expects the usual of it.

    Make it, and use it, on the worker's event loop.
    """

    def __init__(self, worker: Worker, *, empty_within_s: float) -> None:
        self._worker = worker
        self._empty_within_s = empty_within_s
        self._channel = grpc.aio.insecure_channel(worker.address)
        self._link = WorkerLink(worker.address, LINK, lambda load: None)
        self._num_asked = 0
        self._expected: list[int] = []
        self._num_tasks = 0
        self._streams: set[str] = set()

    async def open(self) -> None:
        assert await self._link.wait_up(10.0)
        for _ in range(2):
            self._expected = await self._ask()
        self._num_tasks = len(asyncio.all_tasks())
        self._streams = set(self._worker.decode_leg._outboxes)

    async def close(self) -> None:
        await self._link.close()
        await self._channel.close()

    async def survive(self, calls: list[Call], *, at_once: bool) -> None:
        """Makes the calls, with a stream for the router ``fuzz``, and checks the worker afterwards."""
        failures: list[str] = []
        attached = asyncio.Event()
        streams = [asyncio.create_task(self._attach(attached, failures))]
        await asyncio.wait_for(attached.wait(), 10.0)
        unary: list[asyncio.Task[None]] = []
        for call in calls:
            task = asyncio.create_task(make(self._channel, call, failures))
            (streams if call.method in STREAMS else unary).append(task)
            if not at_once:
                await asyncio.wait([task], timeout=_STEP_S)
        await asyncio.gather(*unary)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await self._tidy(calls)
        await self._check_nothing_is_left()
        assert not failures, failures
        assert not self._worker.engine.dead
        assert await self._ask() == self._expected

    async def _attach(self, attached: asyncio.Event, failures: list[str]) -> None:
        message = worker_pb2.AttachRequest(router_id="fuzz").SerializeToString()
        async for data in self._channel.unary_stream(ATTACH)(message):
            attached.set()
            failures += failures_in(worker_pb2.Frame.FromString(data))

    async def _tidy(self, calls: list[Call]) -> None:
        """Gives back what the calls were given by rights: promises and pinned KV."""
        ids = list(_KNOWN_IDS | _ids_in(calls))
        abort, release = worker_pb2.AbortRequest(request_ids=ids), worker_pb2.ReleaseRequest(request_ids=ids)
        await self._channel.unary_unary(ABORT)(abort.SerializeToString(), timeout=10.0)
        await self._channel.unary_unary(RELEASE)(release.SerializeToString(), timeout=10.0)

    async def _check_nothing_is_left(self) -> None:
        try:
            async with asyncio.timeout(self._empty_within_s):
                while self._held():  # noqa: ASYNC110  nobody tells when a worker becomes empty
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"left behind: {self._held()}") from None

    def _held(self) -> dict[str, Any]:
        leg, load = self._worker.decode_leg, self._worker.engine.load()
        held = {
            "inside": self._worker.gate.num_inside,
            "promised tokens": leg._reservations.num_promised_tokens,
            "decode tasks": sorted(leg._tasks),
            "outboxes": sorted(set(leg._outboxes) - self._streams),
            "KV blocks": load.kv_used_blocks,
            "pinned": load.num_pinned,
            "running": load.num_running,
            "waiting": load.num_waiting,
            "tasks": max(len(asyncio.all_tasks()) - self._num_tasks, 0) if self._num_tasks else 0,
        }
        return {name: value for name, value in held.items() if value}

    async def _ask(self) -> list[int]:
        """Tokens of an answer made by the decode leg, of which the prefill leg makes the first one too."""
        self._num_asked += 1
        request_id = f"asked-{self._num_asked}"
        first = await self._link.prefill(_greedy(f"{request_id}-p", 1), keep_kv=False, timeout_s=10.0)
        deltas: asyncio.Queue[worker_pb2.Delta] = asyncio.Queue()
        message = worker_pb2.GenerateRequest(router_id=LINK, request=_greedy(request_id, NUM_TOKENS))
        await self._link.generate(message, deltas.put_nowait)
        token_ids: list[int] = []
        try:
            while True:
                delta = await asyncio.wait_for(deltas.get(), 10.0)
                assert not delta.HasField("failure"), delta.failure
                token_ids += unpack_tokens(delta.token_ids)
                if delta.finish_reason:
                    break
        finally:
            self._link.forget(request_id)
        assert token_ids[:1] == unpack_tokens(first.delta.token_ids)
        assert len(token_ids) == NUM_TOKENS
        return token_ids


_KNOWN_IDS = set(REQUEST_IDS.elements)  # type: ignore[attr-defined]


def _ids_in(calls: list[Call]) -> set[str]:
    """Ids that mutated calls may have been given something under."""
    found = set()
    for call in calls:
        if not call.decodes:
            continue
        if call.method == RESERVE:
            found.add(worker_pb2.ReserveRequest.FromString(call.data).request_id)
        elif call.method == PREFILL:
            found.add(worker_pb2.PrefillRequest.FromString(call.data).request.request_id)
    return found


def _greedy(request_id: str, max_tokens: int) -> worker_pb2.EngineRequest:
    return worker_pb2.EngineRequest(
        request_id=request_id,
        model="m",
        prompt_token_ids=pack_tokens(PROMPT),
        max_tokens=max_tokens,
        sampling_params=msgspec.msgpack.encode({"temperature": 0.0, "ignore_eos": True}),
    )
