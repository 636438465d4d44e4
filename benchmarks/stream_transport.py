"""The transport that Baton does not use: one server-streaming gRPC call a request, a message a token.

The same engine, the same ``Delta`` messages and the same relay as the product's frames; only what
carries the deltas differs. ``benchmarks.router_ceiling`` runs both side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc

from baton_proto import worker_pb2
from core.errors import WorkerLost
from decode_workers.leg import DecodeLeg
from engine.wire import request_from_proto
from kv_transfer.params import pull
from router.worker_link import OnLoad, Sink, WorkerLink

_SERVICE = "baton.benchmarks.StreamLeg"


class StreamLeg(DecodeLeg):
    """A decode leg whose answer is the call's own stream."""

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a gRPC server needs to offer this service."""
        method = grpc.unary_stream_rpc_method_handler(
            self._stream,
            request_deserializer=worker_pb2.GenerateRequest.FromString,
            response_serializer=worker_pb2.Delta.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(_SERVICE, {"Stream": method})

    async def _stream(
        self, message: worker_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.Delta]:
        self._reservations.release(message.request.request_id)
        kv_params = None
        if message.HasField("kv_handle"):
            handle, deadline_s = await self._accept(message)
            kv_params = pull(handle.connector_params, deadline_s)
        request = request_from_proto(message.request, kv_params)
        with self._gate.enter():
            async with contextlib.aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    self._count(request, delta, pulling=kv_params is not None)
                    yield self._message(request, delta, None)


class StreamLink(WorkerLink):
    """A link that opens a stream for every request; the attached stream only shows that the worker is up."""

    def __init__(self, address: str, router_id: str, on_load: OnLoad) -> None:
        super().__init__(address, router_id, on_load)
        self._open_stream = self.channel.unary_stream(
            f"/{_SERVICE}/Stream",
            request_serializer=worker_pb2.GenerateRequest.SerializeToString,
            response_deserializer=worker_pb2.Delta.FromString,
        )
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def generate(self, message: worker_pb2.GenerateRequest, sink: Sink) -> None:
        message.router_id = self.router_id
        if not self.up:
            raise WorkerLost(f"worker {self.address} is not attached")
        request_id = message.request.request_id
        reader = asyncio.create_task(self._read(message, sink))
        self._readers[request_id] = reader
        reader.add_done_callback(lambda _: self._readers.pop(request_id, None))

    async def _read(self, message: worker_pb2.GenerateRequest, sink: Sink) -> None:
        try:
            async for delta in self._open_stream(message):
                sink(delta)
        except grpc.aio.AioRpcError as error:
            failure = worker_pb2.Failure(kind=worker_pb2.Failure.TRY_ELSEWHERE, message=str(error.details()))
            sink(worker_pb2.Delta(request_id=message.request.request_id, failure=failure))

    async def abort(self, request_id: str) -> bool:
        reader = self._readers.get(request_id)
        if reader is not None:
            reader.cancel()
        return True
