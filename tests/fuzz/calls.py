"""Calls to a worker's gRPC services: what is sent, and what may come back."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from hypothesis import strategies as st

from baton_proto import worker_pb2
from tests.fuzz import values
from tests.fuzz.engine_requests import REQUEST_IDS, ROUTERS, UINT32, engine_requests

PREFILL, RELEASE, RENEW = (f"/baton.v1.PrefillLeg/{name}" for name in ("Prefill", "Release", "RenewLeases"))
ATTACH, RESERVE, GENERATE, ABORT = (
    f"/baton.v1.DecodeLeg/{name}" for name in ("Attach", "Reserve", "Generate", "Abort")
)
WATCH = "/baton.v1.CacheFeed/WatchCache"
STREAMS = (ATTACH, WATCH)
MESSAGES: dict[str, tuple[type[Message], type[Message]]] = {
    PREFILL: (worker_pb2.PrefillRequest, worker_pb2.PrefillReply),
    RELEASE: (worker_pb2.ReleaseRequest, worker_pb2.ReleaseReply),
    RENEW: (worker_pb2.RenewLeasesRequest, worker_pb2.RenewLeasesReply),
    ATTACH: (worker_pb2.AttachRequest, worker_pb2.Frame),
    RESERVE: (worker_pb2.ReserveRequest, worker_pb2.ReserveReply),
    GENERATE: (worker_pb2.GenerateRequest, worker_pb2.GenerateReply),
    ABORT: (worker_pb2.AbortRequest, worker_pb2.AbortReply),
    WATCH: (worker_pb2.WatchCacheRequest, worker_pb2.CacheDelta),
}
REFUSALS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
"""What bad input may be answered; everything else is the worker's own failure."""
CALL_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    data: bytes
    cut_after_s: float | None = None
    """The client leaves then; streams are always left at the end."""

    def __repr__(self) -> str:
        try:
            said: Any = MESSAGES[self.method][0].FromString(self.data)
        except DecodeError:
            said = self.data
        return f"{self.method.rsplit('/', 1)[1]}({said!r}, cut_after_s={self.cut_after_s})"

    @property
    def decodes(self) -> bool:
        try:
            MESSAGES[self.method][0].FromString(self.data)
        except DecodeError:
            return False
        return True


_ID_LISTS = st.lists(REQUEST_IDS, max_size=4)
_HANDLES = st.builds(worker_pb2.KvHandle, body=st.binary(max_size=40), mac=st.binary(max_size=32))
_REQUESTS: dict[str, st.SearchStrategy[Message]] = {
    PREFILL: st.builds(worker_pb2.PrefillRequest, request=engine_requests(), keep_kv=st.booleans()),
    RELEASE: st.builds(worker_pb2.ReleaseRequest, request_ids=_ID_LISTS),
    RENEW: st.builds(worker_pb2.RenewLeasesRequest, engine_request_ids=_ID_LISTS),
    ATTACH: st.builds(worker_pb2.AttachRequest, router_id=ROUTERS),
    RESERVE: st.builds(
        worker_pb2.ReserveRequest, router_id=ROUTERS, request_id=REQUEST_IDS, num_tokens=UINT32
    ),
    GENERATE: st.builds(
        worker_pb2.GenerateRequest,
        router_id=ROUTERS,
        request=engine_requests(),
        kv_handle=st.none() | _HANDLES,
    ),
    ABORT: st.builds(worker_pb2.AbortRequest, router_id=ROUTERS, request_ids=_ID_LISTS),
    WATCH: st.builds(
        worker_pb2.WatchCacheRequest,
        router_id=ROUTERS,
        incarnation=st.sampled_from(["", "nobody", "fuzzed"]),
        known_seq=st.none() | st.integers(0, (1 << 64) - 1),
    ),
}


@st.composite
def calls(draw: st.DrawFn) -> Call:
    method = draw(st.sampled_from([*_REQUESTS, GENERATE, GENERATE, PREFILL]))
    serialized = _REQUESTS[method].map(lambda message: message.SerializeToString())
    data = draw(
        st.one_of(serialized, serialized, serialized, values.mutated(serialized), st.binary(max_size=60))
    )
    cut_after_s = draw(st.sampled_from([None, None, None, 0.0, 0.002, 0.01]))
    return Call(method, data, cut_after_s)


CALLS = st.lists(calls(), min_size=1, max_size=8)


async def make(channel: grpc.aio.Channel, call: Call, failures: list[str]) -> None:
    """Makes one call; adds to ``failures`` what a worker must not do."""
    if call.method in STREAMS:
        await _read_stream(channel, call, failures)
        return
    rpc = channel.unary_unary(call.method)(call.data, timeout=CALL_LIMIT_S)
    if call.cut_after_s is not None:
        asyncio.get_running_loop().call_later(call.cut_after_s, rpc.cancel)
    try:
        MESSAGES[call.method][1].FromString(await rpc)
    except asyncio.CancelledError:
        if call.cut_after_s is None:
            raise
    except grpc.aio.AioRpcError as error:
        failures += _wrong(call, error)


async def _read_stream(channel: grpc.aio.Channel, call: Call, failures: list[str]) -> None:
    """Reads until the client leaves, by plan or because the test is at its end."""
    rpc = channel.unary_stream(call.method)(call.data, timeout=60.0)
    if call.cut_after_s is not None:
        asyncio.get_running_loop().call_later(call.cut_after_s, rpc.cancel)
    try:
        async for data in rpc:
            if call.method == ATTACH:
                failures += failures_in(worker_pb2.Frame.FromString(data))
    except asyncio.CancelledError:
        rpc.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await rpc.code()
        if call.cut_after_s is None:
            raise
    except grpc.aio.AioRpcError as error:
        failures += _wrong(call, error)


def _wrong(call: Call, error: grpc.aio.AioRpcError) -> list[str]:
    # gRPC itself answers UNKNOWN to what does not decode, before a leg sees it.
    refusals = REFUSALS if call.decodes else {*REFUSALS, grpc.StatusCode.UNKNOWN}
    return [] if error.code() in refusals else [f"{call}: {error.code()}: {error.details()}"]


def failures_in(frame: worker_pb2.Frame) -> list[str]:
    """Deltas that say something else than an answer or that the request was bad."""
    return [
        f"{delta.request_id!r}: {delta.failure}"
        for delta in frame.deltas
        if delta.HasField("failure") and delta.failure.kind != worker_pb2.Failure.INVALID_REQUEST
    ]
