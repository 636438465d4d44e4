"""The other endpoints and the official client, against plain vLLM."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import openai
import pytest

from tests.integration import prompts
from tests.integration.parity import check_path, differences
from tests.integration.served import Answer, Body, Served, ServedByBaton

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def joined(answer: Answer) -> list[dict[str, Any]]:
    """Events of a typed stream, neighbours that add to one text as one."""
    events = [
        {key: item for key, item in event.items() if key != "sequence_number"} for event in answer.events
    ]
    result = []
    for _, group in groupby(enumerate(events), key=lambda item: _kind(*item)):
        run = [event for _, event in group]
        result.append(run[0] if len(run) == 1 else {"type": run[0]["type"], "text": "".join(map(_text, run))})
    return result


def _kind(index: int, event: dict[str, Any]) -> Any:
    return event["type"] if event["type"].endswith("delta") else index


def _text(event: dict[str, Any]) -> str:
    delta = event["delta"]
    return str(delta if isinstance(delta, str) else delta["text"])


RESPONSES: dict[str, Body] = {
    "a text": {"input": prompts.text("responses text")},
    "messages with instructions": {
        "instructions": "You answer.",
        "input": [{"role": "user", "content": prompts.text("responses messages")}],
    },
    "sampled": {"input": prompts.text("responses sampled"), "temperature": 1, "seed": 3},
    "JSON by schema": {
        "input": prompts.text("responses schema"),
        "text": {
            "format": {
                "type": "json_schema",
                "name": "answer",
                "schema": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
            }
        },
        "max_output_tokens": 40,
    },
}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_is_plain_vllms(name: str, cluster: ServedByBaton, plain: Served) -> None:
    body = {"max_output_tokens": 12, "temperature": 0, **RESPONSES[name]}

    ours, theirs = cluster.post("/v1/responses", body), plain.post("/v1/responses", body)

    assert (ours.status, theirs.status) == (200, 200), (ours.body, theirs.body)
    assert differences(ours.body, theirs.body) == []
    path = "remote_early" if body["temperature"] == 0 and "text" not in body else "remote"
    check_path(cluster.trace(ours.id), path)


@pytest.mark.parametrize("name", RESPONSES)
def test_a_streamed_response_is_plain_vllms(name: str, cluster: ServedByBaton, plain: Served) -> None:
    body = {"max_output_tokens": 12, "temperature": 0, "stream": True, **RESPONSES[name]}

    ours, theirs = cluster.post("/v1/responses", body), plain.post("/v1/responses", body)

    assert differences(joined(ours), joined(theirs)) == []
    assert ours.events[-1]["type"] == "response.completed"


MESSAGES: dict[str, Body] = {
    "greedy": {},
    "with a system prompt": {"system": "You answer."},
    "with a stop sequence": {"stop_sequences": ["e"]},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_plain_vllms(name: str, stream: bool, cluster: ServedByBaton, plain: Served) -> None:
    messages = [{"role": "user", "content": prompts.text(f"messages {name} {stream}")}]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0, "stream": stream, **MESSAGES[name]}

    ours, theirs = cluster.post("/v1/messages", body), plain.post("/v1/messages", body)

    assert (ours.status, theirs.status) == (200, 200), (ours.body, theirs.body)
    assert differences(ours.body, theirs.body) == []
    assert differences(joined(ours), joined(theirs)) == []
    assert ours.body or ours.events


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "def f(x): return x", "return_token_strs": True}),
        ("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/detokenize", {"tokens": [400, 500, 600]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
def test_tokens_are_counted_as_plain_vllm_counts_them(
    path: str, body: Body, cluster: ServedByBaton, plain: Served
) -> None:
    ours, theirs = cluster.post(path, body), plain.post(path, body)

    assert (ours.status, theirs.status) == (200, 200), (ours.body, theirs.body)
    assert differences(ours.body, theirs.body) == []


@pytest.mark.parametrize("path", ["/v1/models", "/version"])
def test_the_models_and_the_version_are_listed_as_plain_vllm_lists_them(
    path: str, cluster: ServedByBaton, plain: Served
) -> None:
    assert differences(cluster.get(path), plain.get(path)) == []


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_is_answered(path: str, cluster: ServedByBaton) -> None:
    assert cluster.post_raw(path, b"").status_code in (200, 405)


def test_the_official_client_streams_a_chat(cluster: ServedByBaton, plain: Served) -> None:
    said = []
    for server in (cluster, plain):
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
            client.chat.completions.create(
                model=server.model,
                messages=prompts.chat("official client"),
                max_tokens=12,
                temperature=0,
                stream=True,
            ) as stream,
        ):
            said.append([chunk.choices[0].delta.content for chunk in stream if chunk.choices])

    ours, theirs = ("".join(piece or "" for piece in pieces) for pieces in said)
    assert ours == theirs != ""


def test_the_official_client_gets_a_whole_completion(cluster: ServedByBaton) -> None:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model=cluster.model, prompt=prompts.text("official"), max_tokens=7, temperature=0
        )

    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    check_path(cluster.trace(answer.id), "remote_early")
