"""The prefill leg: run a prompt, produce its first token, keep its KV until it is pulled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from baton_proto import worker_pb2, worker_pb2_grpc
from baton_proto.codecs import load_to_proto
from core.errors import RequestRefused, WorkerLost
from core.types import Role
from engine.base import Engine, EngineDelta, EngineRequest
from engine.gate import Gate
from engine.wire import delta_to_proto, request_from_proto
from kv_transfer.handle import KvHandle, KvHandleCodec, KvScope
from kv_transfer.params import PinnedKv, keep_for_pull, pinned_kv
from kv_transfer.peer import KvPeerAddress
from telemetry.worker_metrics import WorkerMetrics

_MAX_DETAILS_CHARS = 500
"""gRPC sends a status's details as a header, and clients refuse headers beyond 8 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLegConfig:
    address: str
    """host:port under which decode workers reach this worker's gRPC server."""
    lease_s: float
    """How long pinned KV waits for its pull, and how far one renewal extends it."""
    peer: KvPeerAddress
    """Where this worker's KV side channel listens."""


class PrefillLeg(worker_pb2_grpc.PrefillLegServicer):
    """gRPC service over an engine."""

    def __init__(
        self,
        engine: Engine,
        codec: KvHandleCodec,
        gate: Gate,
        config: PrefillLegConfig,
        metrics: WorkerMetrics,
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._gate = gate
        self._config = config
        self._metrics = metrics
        self._running: dict[str, asyncio.Task[EngineDelta]] = {}

    async def Prefill(
        self, message: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.PrefillReply:
        request_id = message.request.request_id
        try:
            with self._gate.enter():
                return await self._prefill(message)
        except RequestRefused as refusal:
            self._metrics.refused(Role.PREFILL, type(refusal).__name__.lower())
            return worker_pb2.PrefillReply(refused=str(refusal), load=load_to_proto(self._engine.load()))
        except asyncio.CancelledError:
            if message.keep_kv:  # the engine may have pinned the KV just before
                await asyncio.shield(self._engine.release_kv([request_id]))
            raise
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:_MAX_DETAILS_CHARS])
        except WorkerLost as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    async def _prefill(self, message: worker_pb2.PrefillRequest) -> worker_pb2.PrefillReply:
        request = request_from_proto(message.request, keep_for_pull() if message.keep_kv else None)
        if request.max_tokens != 1:
            raise ValueError(f"a prefill makes one token, not {request.max_tokens}")
        if request.request_id in self._running:
            raise ValueError(f"request {request.request_id!r} is being prefilled already")
        delta = await self._run(request)
        reply = worker_pb2.PrefillReply(
            delta=delta_to_proto(request.request_id, delta), load=load_to_proto(self._engine.load())
        )
        pinned = pinned_kv(delta.kv_params) if message.keep_kv else None
        if pinned is None:
            return reply
        # For some models vLLM leaves the prompt's last tokens to the decode worker.
        reply.first_token_void = pinned.num_tokens < len(request.prompt_token_ids)
        if delta.finish_reason != "length" and not reply.first_token_void:  # the answer is one token long
            await self._engine.release_kv([request.request_id])
            return reply
        reply.kv_handle.CopyFrom(self._mint(message.request, pinned))
        return reply

    def hand_back(self) -> int:
        """Ends every prefill that runs here; routers have them done elsewhere.

        Returns:
            How many that were.
        """
        tasks = [task for task in self._running.values() if not task.done() and not task.cancelling()]
        for task in tasks:
            task.cancel()
        return len(tasks)

    async def _run(self, request: EngineRequest) -> EngineDelta:
        task = self._running[request.request_id] = asyncio.create_task(self._first_delta(request))
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise WorkerLost("the worker hands its prefills back") from None
        finally:
            del self._running[request.request_id]

    async def _first_delta(self, request: EngineRequest) -> EngineDelta:
        """The single delta of a one-token request."""
        async with contextlib.aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if delta.finish_reason is not None:
                    self._metrics.tokens_sampled(len(delta.token_ids))
                    self._metrics.finished(Role.PREFILL, delta.finish_reason)
                    self._metrics.prompt_computed(
                        queue_s=delta.queue_s or 0.0,
                        prefill_s=delta.prefill_s or 0.0,
                        num_tokens=len(request.prompt_token_ids),
                        num_cached_tokens=delta.num_cached_tokens or 0,
                    )
                    return delta
        raise WorkerLost("the engine ended a prefill without an answer")

    def _mint(self, message: worker_pb2.EngineRequest, pinned: PinnedKv) -> worker_pb2.KvHandle:
        handle = KvHandle(
            incarnation=self._engine.info.incarnation,
            address=self._config.address,
            num_tokens=pinned.num_tokens,
            tp_size=pinned.tp_size,
            engine_request_id=pinned.engine_request_id,
            expires_at_s=pinned.expires_at_s,
            connector_params=pinned.connector_params,
        )
        scope = KvScope(adapter=message.adapter, tenant=message.tenant)
        return self._codec.mint(handle, message.prompt_token_ids, scope)

    async def Release(
        self, message: worker_pb2.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ReleaseReply:
        try:
            await self._engine.release_kv(list(message.request_ids))
        except WorkerLost as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return worker_pb2.ReleaseReply()

    async def RenewLeases(
        self, message: worker_pb2.RenewLeasesRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RenewLeasesReply:
        engine_request_ids = list(message.engine_request_ids)
        expires_at_s: Mapping[str, float] = {}
        try:
            if engine_request_ids:
                expires_at_s = await self._engine.renew_kv(engine_request_ids, self._config.lease_s)
        except WorkerLost as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return worker_pb2.RenewLeasesReply(
            now_s=time.monotonic(),
            expires_at_s=expires_at_s,
            incarnation=self._engine.info.incarnation,
            connector_peer=self._config.peer.encode(),
        )
