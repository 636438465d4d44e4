"""Chat: formats, tools and several sequences, against plain vLLM, and which path each takes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration import prompts
from tests.integration.parity import check_path, same_answer
from tests.integration.served import Body, Served, ServedByBaton

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

PATH = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 7]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
OTHER_SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in (("forecast", SCHEMA), ("light", OTHER_SCHEMA))
]
LOOSE_TOOL = {"type": "function", "function": {"name": "forecast", "parameters": SCHEMA}}
NAMED_TOOL = {"type": "function", "function": {"name": "forecast"}}
HERMES_CALL = (
    r"Well <tool_call>\n\{\"name\": \"forecast\", \"arguments\": "
    r"\{\"city\": \"(Oslo|Rome)\", \"days\": [1-9]\}\}\n</tool_call>"
)
BEGUN = {"add_generation_prompt": False, "continue_final_message": True}
THINKING = {"thinking": True}
THINK_START, THINK_END = "7", "8"
"""Token ids of <think> and </think>."""


@dataclass(frozen=True)
class Case:
    name: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("greedy", "remote_early"),
    Case("logprobs", "remote_early", {"logprobs": True, "top_logprobs": 5}),
    Case("sampled with a seed", "remote", {"temperature": 1, "seed": 42, "logprobs": True}),
    Case("two sequences", "local", {"n": 2, "temperature": 1, "seed": 2, "logprobs": True}),
    Case("one token", "prefill_only", {"max_tokens": 1, "logprobs": True, "top_logprobs": 1}),
    Case("an empty answer", "remote_early", {"logit_bias": {"2": 100}, "max_tokens": 5}),
    Case("penalties", "remote", {"presence_penalty": 1.5, "frequency_penalty": 0.5, "max_tokens": 60}),
    Case("prompt logprobs", "local", {"prompt_logprobs": 1}),
    Case("the other name of max_tokens", "remote_early", {"max_tokens": None, "max_completion_tokens": 9}),
    Case("JSON", "remote", {"response_format": {"type": "json_object"}, "max_tokens": 60}),
    Case(
        "JSON by schema",
        "remote",
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}},
            "max_tokens": 60,
        },
    ),
    Case("a choice", "remote", {"structured_outputs": {"choice": ["yes", "no"]}, "logprobs": True}),
    Case("a grammar", "remote", {"structured_outputs": {"grammar": 'root ::= "ab" ("c" | "d") "e"*'}}),
    Case("tools that are not called", "remote_early", {"tools": [LOOSE_TOOL]}),
    Case("strict tools that are not called", "remote", {"tools": TOOLS}),
    Case("tools that must not be called", "remote_early", {"tools": TOOLS, "tool_choice": "none"}),
    Case(
        "a tool called by itself",
        "remote",
        {"tools": TOOLS, "structured_outputs": {"regex": HERMES_CALL}, "max_tokens": 120},
    ),
    Case("a tool must be called", "remote", {"tools": TOOLS, "tool_choice": "required", "max_tokens": 120}),
    Case("a named tool", "remote", {"tools": TOOLS, "tool_choice": NAMED_TOOL, "max_tokens": 120}),
    Case("a named tool cut short", "remote", {"tools": TOOLS, "tool_choice": NAMED_TOOL, "max_tokens": 4}),
    Case("an answer that was begun", "remote_early", BEGUN),
    Case("an adapter", "remote_early", {"model": "tiny-adapted"}),
    Case("reasoning", "remote_early", {"chat_template_kwargs": THINKING}),
    Case(
        "reasoning that is kept back",
        "remote_early",
        {"chat_template_kwargs": THINKING, "include_reasoning": False},
    ),
    Case(
        "reasoning with a budget",
        "remote",
        {"chat_template_kwargs": THINKING, "thinking_token_budget": 5, "logit_bias": {THINK_START: 4}},
    ),
    Case(
        "reasoning that ends at once, then JSON",
        "remote",
        {
            "chat_template_kwargs": THINKING,
            "response_format": {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}},
            "logit_bias": {THINK_END: 100},
            "max_tokens": 60,
        },
    ),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_chat_answer_is_plain_vllms(
    case: Case, stream: bool, cluster: ServedByBaton, plain: Served
) -> None:
    if stream and "prompt_logprobs" in case.body:
        pytest.skip("vLLM does not stream prompt logprobs")
    messages = prompts.chat(f"{case.name} {stream}")
    if "continue_final_message" in case.body:
        messages.append({"role": "assistant", "content": "It is said that"})
    body: Body = {
        "messages": messages,
        "max_tokens": 16,
        "temperature": 0,
        "return_token_ids": True,
        **case.body,
    }
    body["stream"] = stream
    if stream:
        body["stream_options"] = {"include_usage": True}

    answer, trace = same_answer(cluster, plain, PATH, body)

    if case.name == "an empty answer":
        assert answer["usage"]["completion_tokens"] == 1
    else:
        check_path(trace, case.path)


@pytest.fixture(scope="session")
def no_blank_tokens(model_path: Path) -> dict[str, float]:
    """A bias against tokens of white space alone, with which a random model would fill a JSON document."""
    vocabulary = json.loads((model_path / "tokenizer.json").read_text())["model"]["vocab"]
    blanks = (
        "\u0120\u010a\u0109\u010d"  # space, newline, tab and carriage return as the tokenizer spells them
    )
    return {str(token_id): -100.0 for token, token_id in vocabulary.items() if not token.strip(blanks)}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_called_tool_gets_arguments_that_fit_its_schema(
    stream: bool,
    no_blank_tokens: dict[str, float],
    cluster: ServedByBaton,
    plain: Served,
) -> None:
    body = {
        "messages": prompts.chat(f"call {stream}"),
        "max_tokens": 80,
        "temperature": 0,
        "tools": TOOLS[:1],
        "tool_choice": NAMED_TOOL,
        "logit_bias": no_blank_tokens,
        "stream": stream,
    }

    answer, trace = same_answer(cluster, plain, PATH, body)

    choice = answer["choices"][0]
    call = choice["delta" if stream else "message"]["tool_calls"][0]
    assert call["function"]["name"] == "forecast"
    assert json.loads(call["function"]["arguments"]).keys() == {"city", "days"}
    check_path(trace, "remote")


def test_nothing_is_held_after_the_last_answer(cluster: ServedByBaton) -> None:
    cluster.wait_idle(within_s=12)
