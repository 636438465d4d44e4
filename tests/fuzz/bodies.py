"""Requests to the OpenAI surface that are right but for a few fields, or for a few bytes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import values

_HELLO = [{"role": "user", "content": "Hello"}]
_TOOL = {"name": "look", "parameters": {"type": "object", "properties": {"where": {"type": "string"}}}}
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "mock", "prompt": "Hello", "max_tokens": 4},
    "/v1/chat/completions": {"model": "mock", "messages": _HELLO, "max_tokens": 4},
    "/v1/chat/completions/batch": {"model": "mock", "messages": [_HELLO, _HELLO], "max_tokens": 4},
    "/v1/responses": {"model": "mock", "input": "Hello", "max_output_tokens": 4},
    "/v1/messages": {"model": "mock", "messages": _HELLO, "max_tokens": 4},
    "/v1/messages/count_tokens": {"model": "mock", "messages": _HELLO},
    "/tokenize": {"model": "mock", "prompt": "Hello"},
    "/detokenize": {"model": "mock", "tokens": [300, 301]},
    "/generative_scoring": {
        "model": "mock",
        "query": "Is",
        "items": ["a", "b"],
        "label_token_ids": [300, 301],
    },
    "/invocations": {"model": "mock", "messages": _HELLO, "max_tokens": 4},
    "/baton/explain": {"prompt": "Hello"},
}

_TOKENS = st.lists(st.sampled_from([0, 7, 300, 2047, 2048, -1, 2**31, 2**63]), max_size=3)
_SMALL = st.integers(-2, 6)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "nobody", ""])},
        optional={
            "content": values.TEXTS
            | st.none()
            | st.lists(
                st.fixed_dictionaries(
                    {
                        "type": st.sampled_from(
                            ["text", "input_text", "tool_use", "tool_result", "thinking", "smell"]
                        )
                    },
                    optional={"text": values.TEXTS, "input": values.ANYTHING, "content": values.ANYTHING},
                ),
                max_size=2,
            ),
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {"type": st.just("function")},
                    optional={
                        "id": values.TEXTS,
                        "function": st.fixed_dictionaries(
                            {}, optional={"name": values.TEXTS, "arguments": values.TEXTS | values.ANYTHING}
                        ),
                    },
                ),
                max_size=2,
            ),
            "tool_call_id": values.TEXTS,
            "reasoning": values.TEXTS,
            "name": values.TEXTS,
        },
    ),
    max_size=3,
)
_SCHEMAS = st.sampled_from(
    [
        {},
        {"type": "object"},
        {"type": 5},
        {"$ref": "#/nowhere"},
        {"type": "array", "minItems": -1},
        "",
        [],
        None,
    ]
)
_TOOLS = st.lists(
    st.one_of(
        st.just({"type": "function", "function": _TOOL}),
        st.just({"type": "function", **_TOOL}),
        st.just({"name": "look", "input_schema": {"type": "object"}}),
        _SCHEMAS.map(lambda schema: {"type": "function", "function": {"name": "f", "parameters": schema}}),
        st.sampled_from([{"type": "web_search"}, {"type": "code_interpreter"}, {"type": "mcp"}]),
        values.ANYTHING,
    ),
    max_size=2,
)
_PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "messages": _MESSAGES,
    "input": values.TEXTS | _MESSAGES,
    "system": values.TEXTS | _MESSAGES,
    "prompt": values.TEXTS | _TOKENS | st.lists(_TOKENS | values.TEXTS, max_size=3),
    "tokens": _TOKENS,
    "label_token_ids": _TOKENS,
    "stop_token_ids": _TOKENS,
    "allowed_token_ids": _TOKENS,
    "logprob_token_ids": _TOKENS,
    "logit_bias": st.dictionaries(st.sampled_from(["5", "2048", "-1", "x"]), values.NUMBERS, max_size=2),
    "n": _SMALL,
    "best_of": _SMALL,
    "logprobs": _SMALL | st.booleans(),
    "top_logprobs": _SMALL,
    "prompt_logprobs": _SMALL,
    "max_tokens": _SMALL | st.sampled_from([250, 256, 10_000, 2**31, 2**64]),
    "max_completion_tokens": _SMALL | st.sampled_from([250, 256, 10_000, 2**64]),
    "max_output_tokens": _SMALL | st.sampled_from([250, 256, 10_000, 2**64]),
    "min_tokens": _SMALL,
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries(
        {}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
    ),
    "truncate_prompt_tokens": _SMALL,
    "echo": st.booleans(),
    "use_beam_search": st.booleans(),
    "tools": _TOOLS,
    "tool_choice": st.one_of(
        st.sampled_from(["none", "auto", "required", "nothing"]),
        st.sampled_from(["auto", "any", "tool", "none"]).map(lambda kind: {"type": kind, "name": "look"}),
        st.just({"type": "function", "function": {"name": "look"}}),
    ),
    "response_format": st.one_of(
        st.sampled_from(["text", "json_object", "json_schema", "structural_tag"]).map(
            lambda kind: {"type": kind}
        ),
        _SCHEMAS.map(lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}),
    ),
    "text": _SCHEMAS.map(lambda schema: {"format": {"type": "json_schema", "name": "x", "schema": schema}}),
    "structured_outputs": st.fixed_dictionaries(
        {},
        optional={
            "json": _SCHEMAS,
            "regex": st.sampled_from(["", "[a-", "a*", "\0"]),
            "choice": st.lists(values.TEXTS, max_size=2),
            "grammar": st.sampled_from(["", "root ::= (", 'root ::= "a"']),
            "json_object": st.booleans(),
            "structural_tag": st.sampled_from(["", "{", "{}"]),
        },
    ),
    "reasoning": st.sampled_from([{"effort": "low"}, {"effort": "most"}, {}]),
    "thinking": st.sampled_from([{"type": "enabled", "budget_tokens": 5}, {"type": "disabled"}, {}]),
    "chat_template": st.sampled_from(["", "{{", "{{ 1/0 }}", "{{ messages }}"]),
    "store": st.booleans(),
    "background": st.booleans(),
    "previous_response_id": values.TEXTS,
}
_FIELDS_OF_NO_SCHEMA = ("best_of", "kv_transfer_params", "temperature", "cache_salt", "unknown")


def fields_of(openapi: dict[str, Any], path: str) -> list[str]:
    """Names of the fields that a request to ``path`` may have, and a few that it may not."""
    content = openapi["paths"][path]["post"].get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    references = [part["$ref"] for part in (schema, *schema.get("anyOf", ())) if "$ref" in part]
    names = {name for reference in references for name in _properties(openapi, reference)}
    return sorted(names | BASES[path].keys() | set(_FIELDS_OF_NO_SCHEMA))


def _properties(openapi: dict[str, Any], reference: str) -> list[str]:
    return list(openapi["components"]["schemas"][reference.rsplit("/", 1)[1]].get("properties", {}))


def almost_right(openapi: dict[str, Any], path: str) -> st.SearchStrategy[bytes]:
    """JSON bodies with up to three fields spoiled, one left out, or a few bytes broken."""
    spoiled = st.sampled_from(fields_of(openapi, path)).flatmap(
        lambda name: st.tuples(st.just(name), _value_of(name))
    )
    whole = st.lists(spoiled, min_size=1, max_size=3).map(
        lambda changes: _encoded({**BASES[path], **dict(changes)})
    )
    less = st.sampled_from(sorted(BASES[path])).map(
        lambda name: _encoded({key: value for key, value in BASES[path].items() if key != name})
    )
    return st.one_of(whole, whole, whole, whole, whole, whole, less, values.mutated(whole))


def _value_of(name: str) -> st.SearchStrategy[Any]:
    plausible = _PLAUSIBLE.get(name, _SMALL | st.floats(0, 1) | st.booleans())
    return st.one_of(plausible, plausible, plausible, _JSON_VALUES)


_JSON_VALUES = values.ANYTHING.filter(lambda value: _is_json(value))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, default=repr).encode()
