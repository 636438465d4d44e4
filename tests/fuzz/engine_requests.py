"""Requests to a worker's legs that no router would send, and some that one would."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens
from tests.fuzz import values

VOCABULARY = 2048
MAX_MODEL_LEN = 1024
ROUTERS = st.sampled_from(["fuzz", "fuzz", "fuzz", "other", ""])
REQUEST_IDS = st.sampled_from(["a", "b", "c", "", "x" * 3000, "\0", "é-1"])
"""Few, so that they meet again."""
UINT32 = st.one_of(st.integers(0, 5), st.sampled_from([17, MAX_MODEL_LEN, 1 << 20, (1 << 31), (1 << 32) - 1]))
TOKENS = st.integers(0, VOCABULARY - 1)
ODD_TOKENS = st.sampled_from([0, VOCABULARY - 1, VOCABULARY, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
PROMPTS = st.one_of(
    st.lists(TOKENS, min_size=1, max_size=40).map(pack_tokens),
    st.lists(TOKENS | ODD_TOKENS, max_size=6).map(pack_tokens),
    st.sampled_from([MAX_MODEL_LEN - 1, MAX_MODEL_LEN, MAX_MODEL_LEN + 1, 40_000]).map(
        lambda n: pack_tokens([7] * n)
    ),
    st.binary(max_size=9),
)

_TOKEN_LISTS = st.lists(TOKENS | ODD_TOKENS, max_size=3)
_CONSTRAINTS = st.fixed_dictionaries(
    {},
    optional={
        "json": st.sampled_from(["", "{", '{"type": 5}', '{"type": "object"}', "[]"]) | values.ANYTHING,
        "regex": st.sampled_from(["", "[a-", "a*", "(?=a)", "\0"]),
        "choice": st.lists(values.TEXTS, max_size=2),
        "grammar": st.sampled_from(["", "root ::= (", 'root ::= "a"', "not a grammar"]),
        "json_object": st.booleans(),
        "structural_tag": st.sampled_from(["", "{", "{}"]),
        "_backend": st.sampled_from(["xgrammar", "guidance", "outlines", "nothing"]),
    },
)
# Not here, because vLLM 0.32 on a CPU can die of them: seeds (a full batch of rows with and without one) and
# prompt_logprobs (together with an adapter).
_PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(-1, 3),
    "temperature": st.floats(),
    "top_p": st.floats(0, 1) | st.floats(),
    "top_k": st.integers(-2, 5) | values.NUMBERS,
    "min_p": st.floats(0, 1) | st.floats(),
    "presence_penalty": st.floats(-2, 2) | st.floats(),
    "frequency_penalty": st.floats(-2, 2) | st.floats(),
    "repetition_penalty": st.floats(0.1, 2) | st.floats(),
    "max_tokens": values.NUMBERS,
    "min_tokens": st.integers(-1, 5) | values.NUMBERS,
    "stop": st.lists(st.text(max_size=3), max_size=2),
    "stop_token_ids": _TOKEN_LISTS,
    "_all_stop_token_ids": _TOKEN_LISTS,
    "_eos_token_id": TOKENS | ODD_TOKENS,
    "bad_words": st.lists(values.TEXTS, max_size=2),
    "_bad_words_token_ids": st.lists(_TOKEN_LISTS, max_size=2),
    "allowed_token_ids": _TOKEN_LISTS,
    "logit_bias": st.dictionaries(TOKENS | ODD_TOKENS, st.floats(), max_size=2),
    "logprobs": st.integers(-2, 25),
    "logprob_token_ids": _TOKEN_LISTS,
    "structured_outputs": _CONSTRAINTS,
    "thinking_token_budget": st.integers(-1, 3),
    "extra_args": st.dictionaries(
        st.sampled_from(["kv_transfer_params", "baton_replay_token_ids", "else"]), values.ANYTHING, max_size=2
    ),
    "repetition_detection": st.fixed_dictionaries(
        {}, optional={"max_pattern_size": st.integers(-1, 5), "min_count": st.integers(-1, 5)}
    ),
    "trace_decode_token_ids": _TOKEN_LISTS,
    "routed_experts_prompt_start": values.NUMBERS,
    "stream_interval": st.integers(-1, 3),
    "ignore_eos": st.booleans(),
    "output_text_buffer_length": st.integers(-1, 5),
    "skip_reading_prefix_cache": st.booleans(),
}
_ODD_FIELDS = st.sampled_from(sorted(_PLAUSIBLE)).flatmap(
    lambda name: st.tuples(st.just(name), _PLAUSIBLE[name] | values.ANYTHING)
)
_GREEDY = {"temperature": 0.0, "ignore_eos": True}
SAMPLING_PARAMS = st.one_of(
    st.just(msgspec.msgpack.encode(_GREEDY)),
    st.lists(_ODD_FIELDS, max_size=3).map(lambda odd: msgspec.msgpack.encode({**_GREEDY, **dict(odd)})),
    values.msgpacked(values.ANYTHING),
    st.binary(max_size=30),
    st.just(values.DEEP_MSGPACK),
)
ADAPTERS = st.one_of(
    st.sampled_from(
        [["nobody", 1, "/nowhere"], ["", 5, "/"], ["a", 0, "/tmp"], ["a", -1, ""], ["a", 2**40, "/"]]
    ),
    values.ANYTHING,
)
OPTIONS = st.one_of(
    st.just(b""),
    values.msgpacked(
        st.fixed_dictionaries(
            {},
            optional={
                "lora": ADAPTERS,
                "cache_salt": values.TEXTS | values.ANYTHING,
                "reasoning_ended": st.booleans() | values.ANYTHING,
                "reasoning_parser_kwargs": values.ANYTHING,
            },
        )
    ),
    values.msgpacked(values.ANYTHING),
    st.binary(max_size=20),
    st.just(values.DEEP_MSGPACK),
)


@st.composite
def engine_requests(draw: st.DrawFn) -> worker_pb2.EngineRequest:
    """One that a worker could run, with some of its fields spoiled."""
    request = worker_pb2.EngineRequest(
        request_id=draw(REQUEST_IDS),
        model="m",
        prompt_token_ids=pack_tokens([7, 8, 9]),
        max_tokens=draw(st.sampled_from([1, 1, 5])),
        sampling_params=msgspec.msgpack.encode(_GREEDY),
    )
    spoiled = draw(st.sets(st.sampled_from(["prompt", "params", "options", "max", "rest"]), max_size=3))
    if "prompt" in spoiled:
        request.prompt_token_ids = draw(PROMPTS)
    if "params" in spoiled:
        request.sampling_params = draw(SAMPLING_PARAMS)
    if "options" in spoiled:
        request.options = draw(OPTIONS)
    if "max" in spoiled:
        request.max_tokens = draw(UINT32)
    if "rest" in spoiled:
        request.adapter, request.tenant = draw(values.TEXTS), draw(values.TEXTS)
        request.priority = draw(st.integers(-(1 << 31), (1 << 31) - 1))
        request.replay_token_ids = draw(PROMPTS)
        for name, value in draw(st.dictionaries(values.TEXTS, values.TEXTS, max_size=2)).items():
            request.trace_headers[name] = value
    return request
