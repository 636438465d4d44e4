"""One router's connection to one worker: calls to its two legs, and the stream that brings tokens back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from baton_proto import worker_pb2, worker_pb2_grpc
from baton_proto.channel import CLIENT_OPTIONS
from baton_proto.codecs import load_from_proto
from core.errors import Overloaded, WorkerLost, WorkerSilent
from core.types import WorkerLoad
from telemetry.logs import fields

logger = logging.getLogger(__name__)

Sink = Callable[[worker_pb2.Delta], None]
OnLoad = Callable[[WorkerLoad], None]

_RECONNECT_S = 0.2
_MAX_RECONNECT_S = 2.0
_CALL_TIMEOUT_S = 10.0


class WorkerLink:
    """gRPC to one worker start.

    Args:
        router_id: this router start; the worker aborts what it holds for it when the stream breaks.
        on_load: called with every load the worker piggybacks on an answer.
    """

    def __init__(self, address: str, router_id: str, on_load: OnLoad) -> None:
        self.address = address
        self.router_id = router_id
        self._on_load = on_load
        self.channel = grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        self._prefill = worker_pb2_grpc.PrefillLegStub(self.channel)
        self._decode = worker_pb2_grpc.DecodeLegStub(self.channel)
        self._sinks: dict[str, Sink] = {}
        self._attached = asyncio.Event()
        self._closed = False
        self._reader = asyncio.create_task(self._read_frames(), name=f"frames from {address}")

    @property
    def up(self) -> bool:
        """True while the token stream stands."""
        return self._attached.is_set()

    async def wait_up(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._attached.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def prefill(
        self, request: worker_pb2.EngineRequest, *, keep_kv: bool, timeout_s: float
    ) -> worker_pb2.PrefillReply:
        """Runs the prefill leg; cancelling it aborts it on the worker.

        Raises:
            Overloaded: the worker refused.
            ValueError: no worker would take the request.
            WorkerLost: the worker died, or did not answer within ``timeout_s``.
        """
        try:
            reply = await self._call(
                self._prefill.Prefill,
                worker_pb2.PrefillRequest(request=request, keep_kv=keep_kv),
                timeout_s,
            )
        except grpc.aio.AioRpcError as error:
            raise _translate(error, self.address) from error
        self._on_load(load_from_proto(reply.load))
        if reply.refused:
            raise Overloaded(reply.refused)
        return reply

    async def release(self, request_ids: list[str]) -> None:
        """Frees pinned KV that nobody will pull; a dead worker has none."""
        try:
            await self._call(self._prefill.Release, worker_pb2.ReleaseRequest(request_ids=request_ids))
        except (grpc.aio.AioRpcError, WorkerLost) as error:
            logger.info("KV left to its lease", extra=fields(worker=self.address, error=repr(error)))

    async def reserve(self, request_id: str, num_tokens: int) -> bool:
        """Whether the worker keeps KV room for the sequence."""
        try:
            reply = await self._call(
                self._decode.Reserve,
                worker_pb2.ReserveRequest(
                    router_id=self.router_id, request_id=request_id, num_tokens=num_tokens
                ),
            )
        except (grpc.aio.AioRpcError, WorkerLost):
            return False
        self._on_load(load_from_proto(reply.load))
        return not reply.refused

    async def generate(self, message: worker_pb2.GenerateRequest, sink: Sink) -> None:
        """Starts the decode leg; its deltas go to ``sink`` until :meth:`forget`.

        Raises:
            Overloaded: the worker refused; ``sink`` will not be called.
            WorkerLost: it cannot be reached; ``sink`` will not be called.
        """
        message.router_id = self.router_id
        request_id = message.request.request_id
        if not self.up:
            raise WorkerLost(f"worker {self.address} is not attached")
        self._sinks[request_id] = sink
        try:
            reply = await self._call(self._decode.Generate, message)
        except grpc.aio.AioRpcError as error:
            self.forget(request_id)
            raise _translate(error, self.address) from error
        except WorkerLost:
            self.forget(request_id)
            raise
        if reply.refused:
            self.forget(request_id)
            raise Overloaded(reply.refused)

    async def abort(self, request_id: str) -> bool:
        """Ends a decode leg; True once the worker's engine has dropped it."""
        self.forget(request_id)
        try:
            await self._call(
                self._decode.Abort,
                worker_pb2.AbortRequest(router_id=self.router_id, request_ids=[request_id]),
            )
        except (grpc.aio.AioRpcError, WorkerLost):
            return False  # the broken stream aborts it
        return True

    def forget(self, request_id: str) -> None:
        self._sinks.pop(request_id, None)

    @property
    def idle(self) -> bool:
        """True while no decode leg runs over this link."""
        return not self._sinks

    async def close(self) -> None:
        """Ends everything that runs over the link with WorkerLost."""
        self._closed = True
        self._attached.clear()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._lose_all("the worker left the cluster")
        await self.channel.close()

    async def _call(self, method: Any, message: Any, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        """One unary call. One that is open when its channel closes sees a cancellation nobody asked for."""
        try:
            return await method(message, timeout=timeout_s)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise WorkerLost(f"worker {self.address} left the cluster") from None
        except grpc.aio.UsageError as error:
            raise WorkerLost(f"worker {self.address} left the cluster") from error

    async def _read_frames(self) -> None:
        backoff_s = _RECONNECT_S
        while True:
            try:
                async for frame in self._decode.Attach(worker_pb2.AttachRequest(router_id=self.router_id)):
                    self._attached.set()
                    backoff_s = _RECONNECT_S
                    self._deliver(frame)
                reason = "the worker ended the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except Exception as error:
                logger.exception("frames could not be read", extra=fields(worker=self.address))
                reason = repr(error)
            self._attached.clear()
            self._lose_all(reason)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_RECONNECT_S)

    def _deliver(self, frame: worker_pb2.Frame) -> None:
        self._on_load(load_from_proto(frame.load))
        for delta in frame.deltas:
            sink = self._sinks.get(delta.request_id)
            if sink is not None:
                sink(delta)

    def _lose_all(self, reason: str) -> None:
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(
                worker_pb2.Delta(
                    request_id=request_id,
                    failure=worker_pb2.Failure(
                        kind=worker_pb2.Failure.TRY_ELSEWHERE, message=f"{self.address}: {reason}"
                    ),
                )
            )


def _translate(error: grpc.aio.AioRpcError, address: str) -> Exception:
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return ValueError(error.details())
    kind = WorkerSilent if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else WorkerLost
    return kind(f"worker {address}: {error.code().name}: {error.details()}")
