"""Workers on real engines, started from this process: both legs behind gRPC, and the engine in reach."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from prometheus_client import CollectorRegistry

from baton_proto import worker_pb2, worker_pb2_grpc
from baton_proto.channel import SERVER_OPTIONS
from baton_proto.codecs import pack_tokens, unpack_tokens
from core.clock import MonotonicClock
from core.types import Role, WorkerReport
from decode_workers.lease_keeper import LeaseKeeper
from decode_workers.leg import DecodeLeg
from engine.base import EngineDelta, EngineRequest, KvParams
from engine.cache_service import CacheFeedService
from engine.gate import Gate
from engine.vllm_engine import VllmEngine
from kv_transfer.handle import KvHandleCodec, KvIdentity
from kv_transfer.params import NUM_PINNED_STAT, TransferReport
from kv_transfer.peer import KvPeerAddress, free_port
from prefill_workers.leg import PrefillLeg, PrefillLegConfig
from router.worker_link import WorkerLink
from telemetry.worker_metrics import WorkerMetrics
from tests.integration.engine_process import ENVIRONMENT, engine_spec

CLUSTER_KEY = b"a key that these workers share.."
HOST = "127.0.0.1"
_ids = itertools.count()


def next_id(prefix: str) -> str:
    return f"{prefix}{next(_ids)}"


@dataclass
class Answer:
    """Greedy tokens, and what became of the handle they began with."""

    token_ids: list[int] = field(default_factory=list)
    report: TransferReport | None = None
    cached_tokens: int = 0
    """Of the prompt."""


@dataclass(frozen=True)
class Prefilled:
    request_id: str
    first_token: int
    handle: worker_pb2.KvHandle


def greedy(
    prompt: list[int], max_tokens: int, kv_params: KvParams | None = None, cache_salt: str | None = None
) -> EngineRequest:
    """A request that shares cached blocks only with requests of the same salt."""
    from vllm import SamplingParams

    from engine.vllm_codec import encode_options, encode_sampling_params

    return EngineRequest(
        request_id=next_id("e"),
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        sampling_params=encode_sampling_params(SamplingParams(temperature=0.0, ignore_eos=True)),
        options=encode_options(cache_salt=cache_salt),
        kv_params=kv_params,
    )


async def reference(engine: VllmEngine, prompt: list[int], max_tokens: int) -> list[int]:
    """What one engine alone answers, computed from nothing."""
    answer, _ = await run(engine, greedy(prompt, max_tokens, cache_salt=next_id("alone")))
    return answer.token_ids


async def run(engine: VllmEngine, request: EngineRequest) -> tuple[Answer, EngineDelta]:
    """The answer and its last delta."""
    answer = Answer()
    last = EngineDelta()
    async for delta in engine.generate(request):
        answer.token_ids += delta.token_ids
        answer.cached_tokens += delta.num_cached_tokens or 0
        last = delta
    answer.report = TransferReport.from_params(last.kv_params)
    return answer, last


class VllmWorker:
    """One engine with both legs on a port of its own."""

    def __init__(self, engine: VllmEngine, spec: Any, engine_pids: list[int], host: str = HOST) -> None:
        self.engine = engine
        self.engine_processes = [psutil.Process(pid) for pid in engine_pids]
        self.lease_s = spec.lease_s
        self.peer = KvPeerAddress(spec.incarnation, host, spec.side_channel_port, engine.info.tp_size)
        self.codec = self.codec_with(CLUSTER_KEY)
        self._leases = LeaseKeeper(MonotonicClock())
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        listen_on = HOST if host == HOST else "0.0.0.0"
        self.address = f"{host}:{self._server.add_insecure_port(f'{listen_on}:0')}"

    def codec_with(self, key: bytes, **changes: Any) -> KvHandleCodec:
        info = self.engine.info
        identity = {
            "model": info.model,
            "revision": "",
            "block_size_tokens": info.block_size_tokens,
            "kv_layout": info.kv_layout,
        }
        return KvHandleCodec(key, KvIdentity(**{**identity, **changes}))

    async def open(self) -> None:
        self.gate = gate = Gate(max_requests=1000)
        metrics = WorkerMetrics(
            CollectorRegistry(), model="tiny", shape="cpu", worker_id=self.engine.info.incarnation
        )
        config = PrefillLegConfig(address=self.address, lease_s=self.lease_s, peer=self.peer)
        worker_pb2_grpc.add_PrefillLegServicer_to_server(
            PrefillLeg(self.engine, self.codec, gate, config, metrics), self._server
        )
        self.decode_leg = DecodeLeg(
            self.engine, self.codec, gate, self._leases, MonotonicClock(), metrics, lease_s=self.lease_s
        )
        worker_pb2_grpc.add_DecodeLegServicer_to_server(self.decode_leg, self._server)
        service = CacheFeedService(self.engine.cache_log, self.engine.info.incarnation)
        worker_pb2_grpc.add_CacheFeedServicer_to_server(service, self._server)
        await self._server.start()
        self.link = WorkerLink(self.address, "router", lambda load: None)
        assert await self.link.wait_up(10.0)

    async def close(self) -> None:
        await self.link.close()
        await self._server.stop(grace=0)
        await self._leases.close()
        await self.engine.shutdown(timeout_s=5.0)
        self.__dict__.clear()  # whoever still knows this worker does not keep the engine

    def report(self, role: Role) -> WorkerReport:
        """What it would tell a registry."""
        info = self.engine.info
        return WorkerReport(
            worker_id=info.incarnation,
            incarnation=info.incarnation,
            model=info.model,
            revision="",
            shape="cpu",
            allowed_roles=frozenset(Role),
            role=role,
            role_assigned=True,
            draining=False,
            address=self.address,
            node_id="",
            metrics_address="",
            block_size_tokens=info.block_size_tokens,
            num_kv_blocks=info.num_kv_blocks,
            bytes_per_block=info.bytes_per_block,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            load=self.engine.load(),
        )

    # Through the legs, as a router does it.

    async def prefill(self, prompt: list[int]) -> Prefilled:
        """First token and handle of a prompt whose KV now waits to be pulled."""
        request_id = next_id("p")
        reply = await self.link.prefill(_message(request_id, prompt, 1), keep_kv=True, timeout_s=60.0)
        (first_token,) = unpack_tokens(reply.delta.token_ids)
        return Prefilled(request_id, first_token, reply.kv_handle)

    async def decode(
        self, prompt: list[int], max_tokens: int, handle: worker_pb2.KvHandle | None = None
    ) -> tuple[list[int], worker_pb2.Transfer]:
        """Tokens, and what the worker says of the handle."""
        request_id = next_id("d")
        message = worker_pb2.GenerateRequest(request=_message(request_id, prompt, max_tokens))
        if handle is not None:
            message.kv_handle.CopyFrom(handle)
        deltas: asyncio.Queue[worker_pb2.Delta] = asyncio.Queue()
        token_ids: list[int] = []
        await self.link.generate(message, deltas.put_nowait)
        try:
            while True:
                delta = await asyncio.wait_for(deltas.get(), 60.0)
                assert not delta.HasField("failure"), delta.failure
                token_ids += unpack_tokens(delta.token_ids)
                if delta.finish_reason:
                    return token_ids, delta.transfer
        finally:
            self.link.forget(request_id)

    async def wait_empty(self, within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while (load := self.engine.load()).kv_used_blocks or load.num_pinned:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


def _message(request_id: str, prompt: list[int], max_tokens: int) -> worker_pb2.EngineRequest:
    request = greedy(prompt, max_tokens)
    return worker_pb2.EngineRequest(
        request_id=request_id,
        model="tiny",
        prompt_token_ids=pack_tokens(prompt),
        max_tokens=max_tokens,
        sampling_params=request.sampling_params,
    )


@asynccontextmanager
async def vllm_worker(
    name: str,
    model_path: Path,
    *,
    lease_s: int = 30,
    kv_events: bool = False,
    host: str = HOST,
    **engine_args: Any,
) -> AsyncIterator[VllmWorker]:
    """A running worker; ``engine_args`` go on top of those of ``engine_spec``.

    Args:
        host: where other workers reach this one.
    """
    spec = engine_spec(
        str(model_path), incarnation=next_id(name), lease_s=lease_s, num_pinned_stat=NUM_PINNED_STAT
    )
    spec = engine_spec(
        str(model_path),
        incarnation=spec.incarnation,
        lease_s=lease_s,
        num_pinned_stat=NUM_PINNED_STAT,
        engine_args={**spec.engine_args, **engine_args},
        kv_events=kv_events,
        side_channel_host=host,
        side_channel_port=free_port(host),
    )
    before = _children()
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in ENVIRONMENT.items():
            patch.setenv(variable, value)
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        engine = await VllmEngine.start(spec)
    pids = sorted(_children() - before, key=lambda pid: -psutil.Process(pid).memory_info().rss)
    worker = VllmWorker(engine, spec, pids, host)
    await worker.open()
    try:
        yield worker
    finally:
        await worker.close()
        del engine
        gc.collect()  # vLLM's engine cleans up badly while the interpreter exits


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}
