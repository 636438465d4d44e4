"""Completions: what each sampling parameter does, against plain vLLM, and which path it takes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.integration import prompts
from tests.integration.parity import check_path, complete, differences, same_answer
from tests.integration.served import Body, Served, ServedByBaton

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

EOS = 2
EOS_WINS = {str(EOS): 100.0}
PATH = "/v1/completions"
REPETITION = {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 4}
USAGE_ALWAYS = {"include_usage": True, "continuous_usage_stats": True}
JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "point",
        "schema": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "tag": {"enum": ["a", "b"]}},
            "required": ["x", "tag"],
            "additionalProperties": False,
        },
    },
}
FOREIGN_KV = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "another",
    "remote_request_id": "another",
    "remote_block_ids": [[1, 2]],
    "remote_num_tokens": 128,
    "remote_host": "127.0.0.1",
    "remote_port": 1,
    "tp_size": 1,
}


@dataclass(frozen=True)
class Case:
    name: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    stream: bool | None = None
    """None: both ways."""


CASES = [
    Case("greedy", "remote_early"),
    Case("a seed that greedy sampling ignores", "remote_early", {"seed": 3}),
    Case("sampled with a seed", "remote", {"temperature": 0.9, "seed": 3}),
    Case(
        "sampled with a seed, top_p, top_k and min_p",
        "remote",
        {"temperature": 1.3, "seed": 4, "top_p": 0.9, "top_k": 50, "min_p": 0.02},
    ),
    Case("presence penalty", "remote", {"presence_penalty": 1.7, "max_tokens": 60}),
    Case("frequency penalty", "remote", {"frequency_penalty": 1.9, "max_tokens": 60}),
    Case("repetition penalty", "remote_early", {"repetition_penalty": 1.8, "max_tokens": 60}),
    Case(
        "all penalties with a seed",
        "remote",
        {
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.2,
            "temperature": 1,
            "seed": 5,
        },
    ),
    Case("logit bias", "remote_early", {"logit_bias": {"500": 3, "501": 3.5, "502": -100}}),
    Case("allowed tokens", "remote_early", {"allowed_token_ids": [500, 600, 700, 800]}),
    Case("bad words", "remote", {"bad_words": ["return", "the", " path"], "max_tokens": 40}),
    Case("no logprobs but the sampled token's", "remote_early", {"logprobs": 0}),
    Case("one logprob", "remote_early", {"logprobs": 1}),
    Case("twenty logprobs", "remote_early", {"logprobs": 20}),
    Case("logprobs of a seeded sample", "remote", {"logprobs": 5, "temperature": 1.1, "seed": 9}),
    Case("logprobs named by token id", "remote_early", {"logprobs": 2, "return_tokens_as_token_ids": True}),
    Case("prompt logprobs", "local", {"prompt_logprobs": 2}, stream=False),
    Case("echo", "remote_early", {"echo": True}),
    Case("echo with logprobs", "local", {"echo": True, "logprobs": 2}),
    Case("echo of the prompt alone", "prefill_only", {"echo": True, "max_tokens": 0}),
    Case("echo of the prompt alone with logprobs", "local", {"echo": True, "max_tokens": 0, "logprobs": 1}),
    Case("two seeded sequences", "local", {"n": 2, "temperature": 1, "seed": 11}),
    Case("three sequences with logprobs", "local", {"n": 3, "temperature": 1, "seed": 1, "logprobs": 2}),
    Case("one token", "prefill_only", {"max_tokens": 1, "logprobs": 3}),
    Case("two tokens", "remote_early", {"max_tokens": 2, "logprobs": 3}),
    Case("one token that is the end", "prefill_only", {"max_tokens": 1, "logit_bias": EOS_WINS}),
    Case("the end, ignored", "remote_early", {"logit_bias": EOS_WINS, "ignore_eos": True}),
    Case(
        "the end, ignored and shown",
        "remote_early",
        {"logit_bias": EOS_WINS, "ignore_eos": True, "skip_special_tokens": False},
    ),
    Case("the end after a minimum", "remote_early", {"min_tokens": 5, "logit_bias": EOS_WINS, "logprobs": 1}),
    Case("the end after a minimum of one", "remote_early", {"min_tokens": 1, "logit_bias": EOS_WINS}),
    Case("a minimum that is the maximum", "remote_early", {"min_tokens": 16, "logit_bias": EOS_WINS}),
    Case("a prompt cut to its last tokens", "remote_early", {"truncate_prompt_tokens": 40}),
    Case("no special tokens in the prompt", "remote_early", {"add_special_tokens": False}),
    Case("an answer of several blocks", "remote_early", {"max_tokens": 300, "logprobs": 0}),
    Case("a salted cache", "remote_early", {"cache_salt": "pepper"}),
    Case(
        "a repetition that is cut", "remote", {"logit_bias": {"500": 100}, "repetition_detection": REPETITION}
    ),
    Case("JSON by schema", "remote", {"max_tokens": 80, "response_format": JSON_SCHEMA}),
    Case("a regular expression", "remote", {"structured_outputs": {"regex": "[a-c]{3}-[0-9]{4}"}}),
    Case("a choice", "remote", {"structured_outputs": {"choice": ["import os", "import sys"]}}),
    Case("another cluster's KV fields", "remote_early", {"kv_transfer_params": FOREIGN_KV}),
    Case("unknown extra arguments", "remote", {"vllm_xargs": {"flavour": "mint"}}),
    Case("usage in every chunk", "remote_early", {"stream_options": USAGE_ALWAYS}, stream=True),
    Case("chunks of four tokens", "remote_early", {"stream_interval": 4}, stream=True),
]
PARAMS = [
    pytest.param(case, stream, id=f"{case.name}{', streamed' if stream else ''}")
    for case in CASES
    for stream in ([False, True] if case.stream is None else [case.stream])
]


def body_of(case: Case, stream: bool) -> Body:
    body: Body = {"prompt": prompts.text(f"{case.name} {stream}"), "max_tokens": 16, "temperature": 0}
    body |= {"return_token_ids": True, **case.body, "stream": stream}
    if stream:
        body.setdefault("stream_options", {"include_usage": True})
    return body


@pytest.mark.parametrize(("case", "stream"), PARAMS)
def test_a_completion_is_plain_vllms(case: Case, stream: bool, cluster: ServedByBaton, plain: Served) -> None:
    _, trace = same_answer(cluster, plain, PATH, body_of(case, stream))

    check_path(trace, case.path)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_with_its_first_token_never_reaches_a_decode_worker(
    stream: bool, cluster: ServedByBaton, plain: Served
) -> None:
    body = {
        "prompt": prompts.text(f"end {stream}"),
        "max_tokens": 8,
        "temperature": 0,
        "logit_bias": EOS_WINS,
        "stream": stream,
    }

    answer, trace = same_answer(cluster, plain, PATH, body)

    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (trace["path"], trace["output_tokens"], trace["kv_bytes"]) == ("remote_early", 1, 0)


def test_several_prompts_in_one_request_are_answered_in_order(cluster: ServedByBaton, plain: Served) -> None:
    body = {"prompt": [prompts.text(f"many {i}", 60) for i in range(5)], "max_tokens": 9, "temperature": 0}

    answer, _ = same_answer(cluster, plain, PATH, body)

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4]


def test_several_prompts_of_tokens_stream_into_one_answer(cluster: ServedByBaton, plain: Served) -> None:
    body = {
        "prompt": [prompts.tokens(length, f"stream {length}") for length in (1, 127, 128, 129, 300)],
        "max_tokens": 9,
        "temperature": 0,
        "logprobs": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    answer, _ = same_answer(cluster, plain, PATH, body)

    assert answer["usage"]["completion_tokens"] == 45


def test_two_sequences_without_a_seed_differ_and_count_right(cluster: ServedByBaton) -> None:
    body = {"prompt": prompts.text("two"), "max_tokens": 20, "n": 2, "temperature": 1, "ignore_eos": True}

    answer = cluster.post(PATH, body)

    first, second = answer.body["choices"]
    assert first["text"] != second["text"]
    assert answer.body["usage"]["completion_tokens"] == 40
    check_path(cluster.trace(answer.id), "local")


def test_beam_search_is_plain_vllms(cluster: ServedByBaton, plain: Served) -> None:
    body = {
        "model": "tiny",
        "prompt": prompts.text("beam", 40),
        "max_tokens": 5,
        "temperature": 0,
        "n": 2,
        "use_beam_search": True,
    }

    ours, theirs = cluster.post(PATH, body), plain.post(PATH, body)

    assert (ours.status, theirs.status) == (200, 200)
    assert differences(complete(ours), complete(theirs)) == []


def test_an_answer_that_fills_the_context_ends_where_plain_vllms_does(
    cluster: ServedByBaton, plain: Served
) -> None:
    body = {"prompt": prompts.tokens(2030, "full"), "max_tokens": 18, "temperature": 0, "ignore_eos": True}

    answer, trace = same_answer(cluster, plain, PATH, body)

    assert answer["usage"]["total_tokens"] == 2048
    check_path(trace, "remote_early")


def test_a_prompt_that_fills_the_context_but_for_one_token(cluster: ServedByBaton, plain: Served) -> None:
    body = {"prompt": prompts.tokens(2047, "brim"), "max_tokens": 1, "temperature": 0}

    _, trace = same_answer(cluster, plain, PATH, body)

    check_path(trace, "prefill_only")


def test_the_same_prompt_again_is_answered_from_the_caches(cluster: ServedByBaton, plain: Served) -> None:
    body = {"prompt": prompts.tokens(2 * 128, "again"), "max_tokens": 9, "temperature": 0}

    answers = [same_answer(cluster, plain, PATH, body)[0]["choices"] for _ in range(3)]

    assert answers[0] == answers[1] == answers[2]


def test_an_adapters_answers_are_plain_vllms_and_cross_as_the_base_models_do(
    cluster: ServedByBaton, plain: Served
) -> None:
    body = {"prompt": prompts.text("adapter"), "max_tokens": 16, "temperature": 0, "return_token_ids": True}

    base, _ = same_answer(cluster, plain, PATH, body)
    adapted, trace = same_answer(cluster, plain, PATH, {**body, "model": "tiny-adapted"})

    assert adapted["choices"][0]["token_ids"] != base["choices"][0]["token_ids"]
    assert trace["adapter"] == "tiny-adapted"
    check_path(trace, "remote_early")


def test_an_adapters_answers_in_one_batch_are_plain_vllms(cluster: ServedByBaton, plain: Served) -> None:
    # No base model in the batch: vLLM's CPU kernels would apply the adapter to it as well.
    bodies: list[Body] = [
        {
            "prompt": prompts.tokens(100 + 20 * number, f"adapted {number}"),
            "model": "tiny-adapted",
            "max_tokens": 12,
            "temperature": 0,
        }
        for number in range(12)
    ]

    theirs = asyncio.run(plain.post_all(PATH, bodies))
    ours = asyncio.run(cluster.post_all(PATH, bodies))

    assert [differences(complete(a), complete(b)) for a, b in zip(ours, theirs, strict=True)] == [[]] * 12


def test_nothing_is_held_after_the_last_answer(cluster: ServedByBaton) -> None:
    cluster.wait_idle(within_s=12)
