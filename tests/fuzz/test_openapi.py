"""Requests made from the router's own OpenAPI: none gets a 500, none hangs, nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.fuzz.front_end import FrontEnd
from tests.fuzz.http_client import LIMIT_S, check_answer, known_answer
from tests.fuzz.profiles import quick, thorough

# The server runs in this process, and vLLM's deprecations of request fields are no errors of its own.
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

OPERATIONS = [
    "POST /tokenize",
    "POST /detokenize",
    "POST /v1/systemone",
    "POST /v1/chat/completions",
    "POST /v1/chat/completions/batch",
    "POST /v1/responses",
    "GET /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "POST /v1/completions",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /generative_scoring",
    "GET /baton/requests/{request_id}",
    "POST /baton/explain",
    "GET /baton/planner",
]
PLAIN = [
    "/load",
    "/version",
    "/health",
    "/metrics",
    "/v1/models",
    "/ping",
    "/baton/status",
    "/baton/prometheus-sd",
]
"""They take nothing that could be wrong."""


@pytest.fixture(scope="module")
def operations(front_end: FrontEnd) -> Iterator[dict[str, Any]]:
    schema = schemathesis.openapi.from_dict(front_end.openapi)
    with httpx.Client(base_url=front_end.url) as client:
        before = known_answer(client)
        yield {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}
        front_end.check_nothing_is_left()
        assert known_answer(client) == before


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def fuzz(front_end: FrontEnd, operation: Any, session: requests.Session, data: st.DataObject) -> None:
    """One request that fits the schema, or one that does not."""
    mode = data.draw(st.sampled_from(list(GenerationMode)))
    case = data.draw(_cases(operation, mode))
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "mock"
    answer = case.call(base_url=front_end.url, session=session, timeout=LIMIT_S)
    check_answer(case.as_curl_command()[:2000], answer.status_code, answer.headers, answer.content)


def _cases(operation: Any, mode: GenerationMode) -> st.SearchStrategy[Any]:
    fits = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    # Where every path and query is right, there is nothing wrong to make.
    if mode is GenerationMode.NEGATIVE and operation.method.upper() == "POST" and "{" not in operation.path:
        return operation.as_strategy(generation_mode=mode)
    return fits


@pytest.mark.parametrize("label", OPERATIONS)
@quick(8)
@given(data=st.data())
def test_requests_from_the_schema_are_answered_or_refused(
    front_end: FrontEnd, operations: Any, session: requests.Session, data: st.DataObject, label: str
) -> None:
    fuzz(front_end, operations[label], session, data)


@pytest.mark.parametrize("label", OPERATIONS)
@thorough(30)
@given(data=st.data())
def test_requests_from_the_schema_are_answered_or_refused_at_length(
    front_end: FrontEnd, operations: Any, session: requests.Session, data: st.DataObject, label: str
) -> None:
    fuzz(front_end, operations[label], session, data)


@pytest.mark.parametrize("path", PLAIN)
def test_what_takes_nothing_is_answered(front_end: FrontEnd, path: str) -> None:
    answer = httpx.get(front_end.url + path, timeout=LIMIT_S)
    check_answer(path, answer.status_code, answer.headers, answer.content)
    assert answer.status_code == 200


def test_no_operation_that_takes_something_is_left_out(operations: dict[str, Any]) -> None:
    """What is left out, elastic expert parallelism and SageMaker's aliases, has no schema."""
    without = {"POST /ping", "POST /invocations", "POST /scale_elastic_ep", "POST /is_scaling_elastic_ep"}
    known = {*OPERATIONS, *(f"GET {path}" for path in PLAIN), *without, "GET /kv_event_sources"}
    assert set(operations) <= known
