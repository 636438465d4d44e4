"""What a worker reads of a request's parameters: it takes them, or says that the request is wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from vllm.sampling_params import SamplingParams

from engine.base import EngineRequest
from engine.vllm_codec import RequestDecoder
from engine.wire import request_from_proto
from tests.fuzz import values
from tests.fuzz.engine_requests import OPTIONS, SAMPLING_PARAMS, VOCABULARY, engine_requests
from tests.fuzz.profiles import quick, thorough

DECODER = RequestDecoder(VOCABULARY)


def check(sampling_params: bytes, options: bytes) -> None:
    request = EngineRequest(
        request_id="r", prompt_token_ids=[7], max_tokens=3, sampling_params=sampling_params, options=options
    )
    try:
        params, decoded = DECODER.decode(request)
    except ValueError:
        return
    assert isinstance(params, SamplingParams)
    assert params.n == 1
    assert "kv_transfer_params" not in (params.extra_args or {})
    assert all(0 <= token_id < VOCABULARY for token_id in params.all_stop_token_ids)
    assert isinstance(decoded.prompt.get("cache_salt", ""), str)


def _packed(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


GREEDY = _packed(temperature=0.0)


@example(_packed(temperature=-1.0), b"")  # vLLM's own validation error is no ValueError
@example(_packed(stop=[""]), b"")
@example(_packed(n=3), b"")
@example(_packed(_all_stop_token_ids=[VOCABULARY]), b"")
@example(_packed(_bad_words_token_ids=[[-1]]), b"")
@example(_packed(logit_bias={5: float("nan")}), b"")
@example(b"\x81\xa1\xff\x01", b"")
@example(values.DEEP_MSGPACK, b"")
@example(GREEDY, values.DEEP_MSGPACK)
@example(GREEDY, b"\x05")  # a number where options should be
@example(GREEDY, _packed(lora=["a"]))
@example(GREEDY, _packed(lora=["a", 0, ""]))
@example(GREEDY, _packed(cache_salt=[1]))
@quick(300)
@given(SAMPLING_PARAMS, OPTIONS)
def test_parameters_are_taken_or_the_requests_fault(sampling_params: bytes, options: bytes) -> None:
    check(sampling_params, options)


@thorough(3000)
@given(SAMPLING_PARAMS, OPTIONS)
def test_parameters_are_taken_or_the_requests_fault_at_length(sampling_params: bytes, options: bytes) -> None:
    check(sampling_params, options)


@quick(200)
@given(engine_requests())
def test_a_message_becomes_a_request_or_is_wrong(message: Any) -> None:
    try:
        request = request_from_proto(message, None)
    except ValueError:
        return
    assert request.prompt_token_ids
    assert request.request_id
    assert request.max_tokens >= 1


def test_plain_parameters_pass() -> None:
    request = EngineRequest(request_id="r", prompt_token_ids=[7], max_tokens=3, sampling_params=GREEDY)
    assert DECODER.decode(request)[0].max_tokens == 3


def test_replayed_tokens_beyond_the_vocabulary_are_refused() -> None:
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=[7],
        max_tokens=3,
        sampling_params=GREEDY,
        replay_token_ids=[VOCABULARY],
    )
    with pytest.raises(ValueError, match="beyond the vocabulary"):
        DECODER.decode(request)
