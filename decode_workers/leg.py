"""The decode leg: pull a prompt's KV, stream tokens to the router that asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import grpc

from baton_proto import worker_pb2, worker_pb2_grpc
from baton_proto.codecs import load_to_proto
from core.clock import Clock
from core.errors import KvHandleError, RequestRefused, WorkerLost
from core.types import Role
from decode_workers.lease_keeper import LeaseKeeper
from decode_workers.outbox import Outbox
from decode_workers.reservations import Reservations
from engine.base import Engine, EngineDelta, EngineRequest
from engine.gate import Gate
from engine.wire import delta_to_proto, request_from_proto
from kv_transfer.handle import KvHandle, KvHandleCodec, KvScope
from kv_transfer.params import Outcome, TransferReport, pull
from telemetry.logs import fields
from telemetry.worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)

_OUTCOMES = {
    Outcome.PULLED: worker_pb2.Transfer.PULLED,
    Outcome.CACHED: worker_pb2.Transfer.CACHED,
    Outcome.RECOMPUTED: worker_pb2.Transfer.RECOMPUTED,
}
LOAD_BEAT_S = 0.03
"""How soon a change of load reaches routers that get no tokens from here."""
_RENEW_SHARE = 1 / 3
_RESERVATION_TTL_S = 60.0


class DecodeLeg(worker_pb2_grpc.DecodeLegServicer):
    """gRPC service over an engine."""

    def __init__(
        self,
        engine: Engine,
        codec: KvHandleCodec,
        gate: Gate,
        leases: LeaseKeeper,
        clock: Clock,
        metrics: WorkerMetrics,
        *,
        lease_s: float,
    ) -> None:
        info = engine.info
        self._engine = engine
        self._codec = codec
        self._gate = gate
        self._leases = leases
        self._lease_s = lease_s
        self._metrics = metrics
        self._outboxes: dict[str, Outbox] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.keeps_promises = True
        """Whether what was promised room is still taken once the gate takes nothing new."""
        self._reservations = Reservations(
            info.num_kv_blocks * info.block_size_tokens, _RESERVATION_TTL_S, clock
        )

    async def Attach(
        self, message: worker_pb2.AttachRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.Frame]:
        previous = self._outboxes.get(message.router_id)
        # At once: of two streams that come together the later one is the router's.
        outbox = self._outboxes[message.router_id] = Outbox()
        try:
            if previous is not None:
                await previous.close()
            load = self._engine.load()
            yield worker_pb2.Frame(load=load_to_proto(load))
            while not outbox.closed:
                deltas = await outbox.take(LOAD_BEAT_S)
                told, load = load, self._engine.load()
                if deltas or load != told:
                    yield worker_pb2.Frame(deltas=deltas, load=load_to_proto(load))
        finally:
            if self._outboxes.get(message.router_id) is outbox:
                del self._outboxes[message.router_id]
            await asyncio.shield(outbox.close())

    async def Reserve(
        self, message: worker_pb2.ReserveRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ReserveReply:
        load = self._engine.load()
        reply = worker_pb2.ReserveReply(load=load_to_proto(load))
        try:
            self._gate.check()
            used_tokens = load.kv_used_blocks * self._engine.info.block_size_tokens
            self._reservations.reserve(message.request_id, message.num_tokens, used_tokens)
        except RequestRefused as refusal:
            reply.refused = str(refusal)
        return reply

    async def Generate(
        self, message: worker_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.GenerateReply:
        request_id = message.request.request_id
        reserved = self._reservations.release(request_id)
        outbox = self._outboxes.get(message.router_id)
        if outbox is None or outbox.closed:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "attach first")
        if request_id in self._tasks:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"request {request_id!r} runs already")
        try:
            if not (reserved and self.keeps_promises):
                self._gate.check()
        except RequestRefused as refusal:
            self._metrics.refused(Role.DECODE, type(refusal).__name__.lower())
            return worker_pb2.GenerateReply(refused=str(refusal))
        task = asyncio.create_task(self._run(message, outbox), name=f"decode {request_id}")
        outbox.tasks[request_id] = self._tasks[request_id] = task
        task.add_done_callback(lambda _: self._ended(outbox, request_id))
        return worker_pb2.GenerateReply()

    async def Abort(
        self, message: worker_pb2.AbortRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.AbortReply:
        """Answers when the engine has dropped the requests: their KV may be freed at its source then.

        One that died, or cannot be heard any more, has: whatever it still reads, no token of it is sent.
        """
        tasks = [self._tasks[key] for key in message.request_ids if key in self._tasks]
        for task in tasks:
            if not task.cancelling():
                task.cancel()
        for request_id in message.request_ids:
            self._reservations.release(request_id)
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._engine.settle()
        except WorkerLost as error:
            if not self._engine.dead:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return worker_pb2.AbortReply()

    def hand_back(self, reason: str) -> int:
        """Ends everything that runs here; its routers are told to go on with it on another worker.

        Returns:
            How many requests that were.
        """
        error, num_ended = WorkerLost(reason), 0
        for outbox in self._outboxes.values():
            for request_id, task in outbox.tasks.items():
                if task.done() or task.cancelling():
                    continue
                # A task that has been cancelled pushes nothing more: this is the last word.
                task.cancel()
                outbox.push(_failure(request_id, worker_pb2.Failure.TRY_ELSEWHERE, error))
                num_ended += 1
        return num_ended

    def _ended(self, outbox: Outbox, request_id: str) -> None:
        outbox.tasks.pop(request_id, None)
        self._tasks.pop(request_id, None)

    async def _run(self, message: worker_pb2.GenerateRequest, outbox: Outbox) -> None:
        request_id = message.request.request_id
        try:
            with self._gate.hold():
                await self._generate(message, outbox)
        except WorkerLost as error:
            outbox.push(_failure(request_id, worker_pb2.Failure.TRY_ELSEWHERE, error))
        except ValueError as error:
            outbox.push(_failure(request_id, worker_pb2.Failure.INVALID_REQUEST, error))
        except Exception as error:
            logger.exception("decode leg failed", extra=fields(request_id=request_id))
            outbox.push(_failure(request_id, worker_pb2.Failure.INTERNAL, error))

    async def _generate(self, message: worker_pb2.GenerateRequest, outbox: Outbox) -> None:
        handle, kv_params, report = None, None, None
        if message.HasField("kv_handle"):
            try:
                handle, deadline_s = await self._accept(message)
                kv_params = pull(handle.connector_params, deadline_s)
            except KvHandleError as error:
                logger.warning(
                    "KV handle refused",
                    extra=fields(request_id=message.request.request_id, reason=error.reason),
                )
                report = TransferReport(outcome=Outcome.RECOMPUTED, reason=error.reason)
        request = request_from_proto(message.request, kv_params)
        renewal = asyncio.create_task(self._renew(handle, request.request_id)) if handle else None
        try:
            async with contextlib.aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    if renewal is not None:  # the blocks are here, or recomputed
                        renewal.cancel()
                        renewal = None
                    self._count(request, delta, pulling=handle is not None)
                    outbox.push(self._message(request, delta, report))
        finally:
            if renewal is not None:
                renewal.cancel()

    async def _accept(self, message: worker_pb2.GenerateRequest) -> tuple[KvHandle, float]:
        request = message.request
        scope = KvScope(adapter=request.adapter, tenant=request.tenant)
        handle = self._codec.check(message.kv_handle, request.prompt_token_ids, scope)
        mine = self._engine.info
        if handle.incarnation == mine.incarnation:
            raise KvHandleError("own", "KV of this very engine needs no pull")
        if handle.tp_size % mine.tp_size and mine.tp_size % handle.tp_size:
            raise KvHandleError("other_tp", f"TP {handle.tp_size} to TP {mine.tp_size}")
        return handle, await self._leases.deadline_s(handle)

    async def _renew(self, handle: KvHandle, request_id: str) -> None:
        while True:
            await asyncio.sleep(self._lease_s * _RENEW_SHARE)
            try:
                deadline_s = await self._leases.renew(handle)
                await self._engine.extend_kv_deadline(request_id, deadline_s)
            except (KvHandleError, WorkerLost) as error:
                logger.warning("lease not renewed", extra=fields(request_id=request_id, reason=str(error)))
                return

    def _count(self, request: EngineRequest, delta: EngineDelta, *, pulling: bool) -> None:
        self._metrics.tokens_sampled(len(delta.token_ids))
        if delta.queue_s is not None and not pulling:
            self._metrics.prompt_computed(
                queue_s=delta.queue_s,
                prefill_s=delta.prefill_s or 0.0,
                num_tokens=len(request.prompt_token_ids),
                num_cached_tokens=delta.num_cached_tokens or 0,
            )
        if delta.finish_reason is not None:
            self._metrics.finished(Role.DECODE, delta.finish_reason)

    def _message(
        self, request: EngineRequest, delta: EngineDelta, refused: TransferReport | None
    ) -> worker_pb2.Delta:
        """The delta on the wire; the last one says what became of the KV handle."""
        message = delta_to_proto(request.request_id, delta)
        report = refused or TransferReport.from_params(delta.kv_params)
        if delta.finish_reason is None or report is None:
            return message
        message.transfer.CopyFrom(
            worker_pb2.Transfer(
                outcome=_OUTCOMES[report.outcome],
                reason=report.reason,
                num_bytes=report.num_bytes,
                pull_s=report.pull_s,
            )
        )
        if report.outcome is Outcome.PULLED:
            self._metrics.kv_pulled(report.num_bytes, report.pull_s)
        elif report.outcome is Outcome.CACHED:
            self._metrics.kv_cached()
        else:
            self._metrics.kv_recomputed(report.reason)
        return message


def _failure(request_id: str, kind: worker_pb2.Failure.Kind, error: Exception) -> worker_pb2.Delta:
    return worker_pb2.Delta(request_id=request_id, failure=worker_pb2.Failure(kind=kind, message=str(error)))
