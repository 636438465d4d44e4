"""KV handles and peer addresses, however wrong: a reason to recompute comes out, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens
from core.errors import KvHandleError
from kv_transfer.handle import KvHandle, KvHandleCodec, KvIdentity, KvScope, token_digest
from kv_transfer.params import pull
from kv_transfer.peer import KvPeerAddress
from tests.fuzz import values
from tests.fuzz.profiles import quick, thorough

KEY = b"k" * 32
SCOPE = KvScope(adapter="", tenant="t")
PROMPT = pack_tokens(range(100, 140))
CODEC = KvHandleCodec(KEY, KvIdentity(model="m", revision="r", block_size_tokens=16, kv_layout="f32"))
PARAMS: dict[str, Any] = {
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "i1",
    "remote_request_id": "e1",
    "remote_host": "127.0.0.1",
    "remote_port": 5,
    "tp_size": 1,
    "remote_num_tokens": 40,
}
BODY: dict[str, Any] = {
    "incarnation": "i1",
    "address": "127.0.0.1:1",
    "model": "m",
    "revision": "r",
    "adapter": "",
    "tenant": "t",
    "num_tokens": 40,
    "token_digest": token_digest(PROMPT, SCOPE),
    "block_size_tokens": 16,
    "tp_size": 1,
    "kv_layout": "f32",
    "engine_request_id": "e1",
    "expires_at_s": 12.5,
    "connector_params": msgspec.msgpack.encode(PARAMS),
}
UINT32 = st.integers(0, (1 << 32) - 1) | st.integers(0, 100)


def signed(body: bytes) -> worker_pb2.KvHandle:
    """As a worker of this cluster signs it."""
    return worker_pb2.KvHandle(body=body, mac=CODEC._mac(body))


def body_with(**fields: Any) -> bytes:
    return worker_pb2.KvHandleBody(**{**BODY, **fields}).SerializeToString()


def params_with(**fields: Any) -> bytes:
    return body_with(connector_params=msgspec.msgpack.encode({**PARAMS, **fields}))


def _field_values(name: str) -> st.SearchStrategy[Any]:
    return {
        str: values.TEXTS,
        int: UINT32,
        float: st.floats(),
        bytes: st.binary(max_size=40) | values.msgpacked(values.ANYTHING),
    }[type(BODY[name])]


ODD_PARAMS = st.dictionaries(st.sampled_from([*PARAMS, "transfer_mode", "dcp_size", "else"]), values.ANYTHING)
BODIES = st.one_of(
    st.binary(max_size=200),
    values.mutated(st.just(body_with())),
    st.sampled_from(sorted(BODY)).flatmap(
        lambda name: _field_values(name).map(lambda value: body_with(**{name: value}))
    ),
    values.mutated(st.just(msgspec.msgpack.encode(PARAMS))).map(lambda raw: body_with(connector_params=raw)),
    ODD_PARAMS.map(lambda odd: params_with(**odd)),
)


def check_one(message: worker_pb2.KvHandle) -> None:
    """It is refused, or it is whole and about the very tokens of the prompt."""
    try:
        handle = CODEC.check(message, PROMPT, SCOPE)
    except KvHandleError:
        return
    _is_sound(handle)


def _is_sound(handle: KvHandle) -> None:
    assert 0 < handle.num_tokens <= len(PROMPT) // 4
    assert handle.tp_size > 0
    assert math.isfinite(handle.expires_at_s)
    params = pull(handle.connector_params, 1.0)
    assert params["remote_num_tokens"] == handle.num_tokens
    assert all(block_id >= 0 for group in params["remote_block_ids"] for block_id in group)
    for name, value in PARAMS.items():
        assert type(params[name]) is type(value)


FOUND: list[Callable[[Any], Any]] = [
    example(body_with(connector_params=b"\x81\xa1\xff\x01")),  # a key that is no UTF-8
    example(body_with(connector_params=b"\x81\xa1a" + values.DEEP_MSGPACK)),
    example(body_with(expires_at_s=math.nan)),  # a lease that never ends
    example(body_with(expires_at_s=math.inf)),
    example(body_with(tp_size=0)),
    example(params_with(remote_num_tokens=400)),  # more tokens than the digest speaks for
    example(params_with(remote_num_tokens="forty")),
    example(params_with(remote_block_ids=[[-1, -2, -3]])),  # would be counted from the cache's end
    example(params_with(remote_block_ids=None)),
    example(params_with(do_remote_decode=True)),
]


def with_what_was_found(test: Any) -> Any:
    for add in FOUND:
        test = add(test)
    return test


@with_what_was_found
@quick(600)
@given(BODIES)
def test_a_signed_body_is_sound_or_refused(body: bytes) -> None:
    check_one(signed(body))


@thorough(20_000)
@given(BODIES)
def test_a_signed_body_is_sound_or_refused_at_length(body: bytes) -> None:
    check_one(signed(body))


@quick(500)
@given(values.mutated(st.just(signed(body_with()).SerializeToString())) | st.binary(max_size=200))
def test_nothing_unsigned_passes(raw: bytes) -> None:
    try:
        message = worker_pb2.KvHandle.FromString(raw)
    except Exception:
        return  # gRPC refuses it before anybody sees it
    if message != signed(body_with()):
        with pytest.raises(KvHandleError):
            CODEC.check(message, PROMPT, SCOPE)


PEER = KvPeerAddress("e", "127.0.0.1", 5, 1).encode()
PEERS = st.one_of(st.binary(max_size=80), values.mutated(st.just(PEER)), values.msgpacked(values.ANYTHING))


@example(PEER[:-1])
@example(b"\x84\xa9engine_id\xa1\xff" + PEER[12:])
@example(values.DEEP_MSGPACK)
@quick(500)
@given(PEERS)
def test_a_peer_address_decodes_or_is_refused(data: bytes) -> None:
    try:
        peer = KvPeerAddress.decode(data)
    except KvHandleError:
        return
    assert 0 <= peer.port <= 65535
    assert peer.tp_size > 0


def test_a_sound_handle_passes() -> None:
    assert CODEC.check(signed(body_with()), PROMPT, SCOPE).connector_params == PARAMS
