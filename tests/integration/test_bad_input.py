"""Requests that no server should accept get plain vLLM's refusal, and the cluster serves on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.integration import prompts
from tests.integration.parity import same_answer
from tests.integration.served import Body, Served, ServedByBaton

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.fault_row(18)]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEEP = 100_000
HELLO = [{"role": "user", "content": "Hello"}]


def _completion(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 4, **fields}).encode()


def _chat(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 4, **fields}).encode()


BAD: dict[str, tuple[str, bytes]] = {
    "nothing at all": (COMPLETIONS, b""),
    "an empty object": (COMPLETIONS, b"{}"),
    "an empty object for chat": (CHAT, b"{}"),
    "null": (COMPLETIONS, b"null"),
    "a list": (CHAT, b"[]"),
    "a string": (COMPLETIONS, b'"hello"'),
    "broken JSON": (COMPLETIONS, b'{"model": "tiny", "prompt": '),
    "two documents": (COMPLETIONS, b"{} {}"),
    "invalid UTF-8": (COMPLETIONS, b'{"model": "tiny", "prompt": "\xff\xfe\xc3\x28"}'),
    "half a surrogate": (COMPLETIONS, b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 2}'),
    "a NUL character": (COMPLETIONS, b'{"model": "tiny", "prompt": "a\x00b", "max_tokens": 2}'),
    "not a number": (COMPLETIONS, b'{"model": "tiny", "prompt": "Hello", "temperature": NaN}'),
    "brackets without end": (COMPLETIONS, b"[" * DEEP),
    "deep lists": (COMPLETIONS, b'{"model": "tiny", "prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}"),
    "deep objects": (CHAT, b'{"model": "tiny", "messages": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}"),
    "deep extra fields": (COMPLETIONS, _completion()[:-1] + b', "x": ' + b"[" * DEEP + b"]" * DEEP + b"}"),
    "an unknown model": (COMPLETIONS, _completion(model="nobody")),
    "an unknown model for chat": (CHAT, _chat(model="nobody")),
    "a model that is a number": (COMPLETIONS, _completion(model=7)),
    "an empty prompt": (COMPLETIONS, _completion(prompt="")),
    "an empty list of tokens": (COMPLETIONS, _completion(prompt=[])),
    "an empty list of messages": (CHAT, _chat(messages=[])),
    "messages that are a string": (CHAT, _chat(messages="Hello")),
    "a message without a role": (CHAT, _chat(messages=[{"content": "Hello"}])),
    "a message with an unknown part": (
        CHAT,
        _chat(messages=[{"role": "user", "content": [{"type": "smell"}]}]),
    ),
    "an image": (
        CHAT,
        _chat(
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]
        ),
    ),
    "a prompt that is an object": (COMPLETIONS, _completion(prompt={"a": 1})),
    "a token that is negative": (COMPLETIONS, _completion(prompt=[-1])),
    "a token beyond the vocabulary": (COMPLETIONS, _completion(prompt=[10**6])),
    "a token beyond 64 bits": (COMPLETIONS, _completion(prompt=[2**70])),
    "a prompt beyond the context": (COMPLETIONS, _completion(prompt=prompts.tokens(2049, "beyond"))),
    "a prompt that leaves no room": (COMPLETIONS, _completion(prompt=prompts.tokens(2048, "room"))),
    "more tokens than the context holds": (COMPLETIONS, _completion(max_tokens=4000)),
    "more chat tokens than the context holds": (CHAT, _chat(max_tokens=4000)),
    "a text of two million characters": (COMPLETIONS, _completion(prompt="word " * 400_000)),
    "a chat of two million characters": (
        CHAT,
        _chat(messages=[{"role": "user", "content": "x y " * 500_000}]),
    ),
    "no tokens": (COMPLETIONS, _completion(max_tokens=0)),
    "no chat tokens": (CHAT, _chat(max_tokens=0)),
    "a negative number of tokens": (COMPLETIONS, _completion(max_tokens=-5)),
    "a number of tokens that is a text": (COMPLETIONS, _completion(max_tokens="many")),
    "a number of tokens beyond 64 bits": (COMPLETIONS, _completion(max_tokens=2**70)),
    "a negative temperature": (COMPLETIONS, _completion(temperature=-1)),
    "a temperature that is a list": (COMPLETIONS, _completion(temperature=[1])),
    "top_p above one": (COMPLETIONS, _completion(top_p=1.5)),
    "top_k below minus one": (COMPLETIONS, _completion(top_k=-7)),
    "no sequences": (COMPLETIONS, _completion(n=0)),
    "too many sequences": (COMPLETIONS, _completion(n=10**6, temperature=1)),
    "greedy sequences that would be the same": (COMPLETIONS, _completion(n=2, temperature=0)),
    "too many logprobs": (COMPLETIONS, _completion(logprobs=1000)),
    "negative logprobs": (CHAT, _chat(logprobs=True, top_logprobs=-3)),
    "prompt logprobs in a stream": (COMPLETIONS, _completion(prompt_logprobs=1, stream=True)),
    "a penalty out of range": (COMPLETIONS, _completion(presence_penalty=9)),
    "a repetition penalty of nothing": (COMPLETIONS, _completion(repetition_penalty=0)),
    "a bias for no token": (COMPLETIONS, _completion(logit_bias={"x": 1})),
    "a bias beyond the vocabulary": (COMPLETIONS, _completion(logit_bias={"999999": 1})),
    "an allowed token beyond the vocabulary": (COMPLETIONS, _completion(allowed_token_ids=[10**6])),
    "no allowed token": (COMPLETIONS, _completion(allowed_token_ids=[])),
    "an empty bad word": (COMPLETIONS, _completion(bad_words=[""])),
    "an empty stop string": (COMPLETIONS, _completion(stop=[""])),
    "a stop token that is a text": (COMPLETIONS, _completion(stop_token_ids=["x"])),
    "a minimum above the maximum": (COMPLETIONS, _completion(min_tokens=9)),
    "a seed beyond 64 bits": (COMPLETIONS, _completion(seed=2**70)),
    "a schema that is none": (
        COMPLETIONS,
        _completion(
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}
        ),
    ),
    "a broken regular expression": (COMPLETIONS, _completion(structured_outputs={"regex": "[a-"})),
    "a broken grammar": (COMPLETIONS, _completion(structured_outputs={"grammar": "root ::= ("})),
    "two constraints": (COMPLETIONS, _completion(structured_outputs={"regex": "a", "choice": ["a"]})),
    "an empty choice": (COMPLETIONS, _completion(structured_outputs={"choice": []})),
    "an unknown response format": (CHAT, _chat(response_format={"type": "poem"})),
    "a tool without a name": (CHAT, _chat(tools=[{"type": "function", "function": {}}])),
    "a named tool that is not there": (
        CHAT,
        _chat(
            tools=[{"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}],
            tool_choice={"type": "function", "function": {"name": "b"}},
        ),
    ),
    "a tool choice without tools": (CHAT, _chat(tool_choice="required")),
    "stream options without a stream": (COMPLETIONS, _completion(stream_options={"include_usage": True})),
    "an echo in a streamed beam search": (COMPLETIONS, _completion(use_beam_search=True, stream=True)),
    "a suffix": (COMPLETIONS, _completion(suffix="end")),
    "KV fields that are a list": (COMPLETIONS, _completion(kv_transfer_params=[1])),
    "KV fields of another cluster": (
        COMPLETIONS,
        _completion(
            temperature=0,
            kv_transfer_params={
                "do_remote_prefill": True,
                "remote_block_ids": [[0]],
                "remote_engine_id": "x",
                "remote_request_id": "x",
                "remote_host": "127.0.0.1",
                "remote_port": 9,
                "remote_num_tokens": 10**9,
                "tp_size": 3,
            },
        ),
    ),
    "KV fields that would pin memory": (
        COMPLETIONS,
        _completion(temperature=0, kv_transfer_params={"do_remote_decode": True, "do_remote_prefill": False}),
    ),
    "a priority": (COMPLETIONS, _completion(priority=3)),
    "a chat template": (CHAT, _chat(chat_template="{{ messages | length }}")),
    "a cache salt that is empty": (COMPLETIONS, _completion(cache_salt="")),
    "prompt embeddings": (COMPLETIONS, _completion(prompt=None, prompt_embeds="AAAA")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_plain_vllms_answer(name: str, cluster: ServedByBaton, plain: Served) -> None:
    path, content = BAD[name]

    ours, theirs = cluster.post_raw(path, content), plain.post_raw(path, content)

    assert _summary(ours) == _summary(theirs)
    assert ours.status_code < 500


def _summary(response: Any) -> dict[str, Any]:
    """Status and everything of an error but ids; of an answer, that it is one."""
    summary = {"status": response.status_code}
    if response.status_code != 200:
        error = response.json().get("error", {})
        summary |= {key: error.get(key) for key in ("type", "code", "param", "message")}
    return summary


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", COMPLETIONS), ("POST", "/v1/nothing"), ("DELETE", CHAT), ("GET", "/v1/models/nobody")],
)
def test_a_wrong_method_or_path_gets_plain_vllms_answer(
    method: str, path: str, cluster: ServedByBaton, plain: Served
) -> None:
    ours, theirs = cluster.request(method, path), plain.request(method, path)

    assert ours.status_code == theirs.status_code >= 400
    assert ours.json() == theirs.json()


def test_bad_and_good_requests_at_once_do_not_disturb_each_other(
    cluster: ServedByBaton, plain: Served
) -> None:
    good: list[Body] = [
        {"prompt": prompts.tokens(150, f"good {i}"), "max_tokens": 8, "temperature": 0} for i in range(24)
    ]
    bad: list[Body] = [
        {"prompt": prompts.tokens(3000, f"bad {i}"), "max_tokens": -i, "structured_outputs": {"regex": "["}}
        for i in range(24)
    ]
    expected = asyncio.run(plain.post_all(COMPLETIONS, good))

    mixed = asyncio.run(
        cluster.post_all(COMPLETIONS, [body for pair in zip(good, bad, strict=True) for body in pair])
    )

    texts = [answer.body["choices"][0]["text"] for answer in mixed[::2]]
    assert texts == [answer.body["choices"][0]["text"] for answer in expected]
    assert {answer.status for answer in mixed[1::2]} == {400}


def test_the_cluster_serves_after_all_that(cluster: ServedByBaton, plain: Served) -> None:
    same_answer(
        cluster, plain, COMPLETIONS, {"prompt": prompts.text("after"), "max_tokens": 9, "temperature": 0}
    )
    cluster.wait_idle(within_s=12)
