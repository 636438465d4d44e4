"""KV handles: what fits is accepted, everything else is refused with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens
from core.errors import KvHandleError
from kv_transfer.handle import KvHandle, KvHandleCodec, KvIdentity, KvScope, token_digest

KEY = b"k" * 32
IDENTITY = KvIdentity(model="m", revision="r1", block_size_tokens=16, kv_layout="f32")
SCOPE = KvScope(adapter="", tenant="t")
PROMPT = pack_tokens(range(100, 140))
HANDLE = KvHandle(
    incarnation="i1",
    address="127.0.0.1:1",
    num_tokens=40,
    tp_size=1,
    engine_request_id="e1",
    expires_at_s=12.5,
    connector_params={
        "remote_block_ids": [[1, 2, 3]],
        "remote_engine_id": "i1",
        "remote_request_id": "e1",
        "remote_host": "127.0.0.1",
        "remote_port": 5,
        "tp_size": 1,
        "remote_num_tokens": 40,
    },
)


@pytest.fixture
def codec() -> KvHandleCodec:
    return KvHandleCodec(KEY, IDENTITY)


def reason_of(codec: KvHandleCodec, message: worker_pb2.KvHandle, prompt=PROMPT, scope=SCOPE) -> str:
    with pytest.raises(KvHandleError) as refused:
        codec.check(message, prompt, scope)
    return refused.value.reason


def test_a_minted_handle_comes_back_as_it_was(codec: KvHandleCodec) -> None:
    assert codec.check(codec.mint(HANDLE, PROMPT, SCOPE), PROMPT, SCOPE) == HANDLE


def test_a_handle_covers_the_head_of_a_longer_prompt(codec: KvHandleCodec) -> None:
    assert codec.check(codec.mint(HANDLE, PROMPT, SCOPE), PROMPT + pack_tokens([7]), SCOPE).num_tokens == 40


def test_other_tokens_are_refused(codec: KvHandleCodec) -> None:
    message = codec.mint(HANDLE, PROMPT, SCOPE)
    assert reason_of(codec, message, PROMPT[:-4] + pack_tokens([1])) == "other_tokens"
    assert reason_of(codec, message, PROMPT[:-4]) == "other_tokens"
    assert reason_of(codec, message, PROMPT[:-1]) == "other_tokens"
    assert reason_of(codec, message, b"") == "other_tokens"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "other"}, "other_model"),
        ({"revision": "r2"}, "other_model"),
        ({"block_size_tokens": 32}, "other_layout"),
        ({"kv_layout": "bf16"}, "other_layout"),
    ],
)
def test_kv_of_an_unlike_worker_is_refused(codec: KvHandleCodec, change: dict, reason: str) -> None:
    unlike = KvHandleCodec(KEY, replace(IDENTITY, **change))
    assert reason_of(codec, unlike.mint(HANDLE, PROMPT, SCOPE)) == reason


def test_kv_of_another_adapter_or_tenant_is_refused(codec: KvHandleCodec) -> None:
    message = codec.mint(HANDLE, PROMPT, SCOPE)
    assert reason_of(codec, message, scope=KvScope(adapter="a", tenant="t")) == "other_scope"
    assert reason_of(codec, message, scope=KvScope(adapter="", tenant="u")) == "other_scope"


def test_another_cluster_key_is_a_forgery(codec: KvHandleCodec) -> None:
    forged = KvHandleCodec(b"x" * 32, IDENTITY).mint(HANDLE, PROMPT, SCOPE)
    assert reason_of(codec, forged) == "forged"


def test_a_signed_body_that_does_not_decode_is_malformed(codec: KvHandleCodec) -> None:
    body = b"\xff\xff\xff"
    message = worker_pb2.KvHandle(body=body, mac=codec._mac(body))
    assert reason_of(codec, message) == "malformed"


def test_a_huge_body_is_refused_before_it_is_hashed(codec: KvHandleCodec) -> None:
    assert reason_of(codec, worker_pb2.KvHandle(body=bytes((16 << 20) + 1))) == "oversized"


@given(st.data())
def test_a_mutated_handle_never_passes(data: st.DataObject) -> None:
    codec = KvHandleCodec(KEY, IDENTITY)
    message = codec.mint(HANDLE, PROMPT, SCOPE)
    raw = bytearray(message.SerializeToString())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        mutated = worker_pb2.KvHandle.FromString(bytes(raw))
    except Exception:
        return  # gRPC refuses it before we see it
    if mutated == message:
        return
    reason_of(codec, mutated)


@given(st.binary(max_size=200), st.binary(max_size=64))
def test_random_bytes_are_refused(body: bytes, mac: bytes) -> None:
    assert reason_of(KvHandleCodec(KEY, IDENTITY), worker_pb2.KvHandle(body=body, mac=mac)) == "forged"


def test_scopes_cannot_be_glued_into_one_another() -> None:
    one = token_digest(b"1", KvScope(adapter="ab", tenant="c"))
    assert one != token_digest(b"1", KvScope(adapter="a", tenant="bc"))


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        KvHandleCodec(b"short", IDENTITY)
