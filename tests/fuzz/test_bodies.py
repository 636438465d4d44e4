"""Bodies and headers of any kind at the router's HTTP port: a clear refusal or an answer, never a 500."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import values
from tests.fuzz.bodies import BASES, almost_right
from tests.fuzz.front_end import FrontEnd
from tests.fuzz.http_client import LIMIT_S, check_answer, known_answer
from tests.fuzz.profiles import quick, thorough

# The server runs in this process, and vLLM's deprecations of request fields are no errors of its own.
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEEP = 100_000
JSON_TYPE = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(front_end: FrontEnd):
    with httpx.Client(base_url=front_end.url, timeout=LIMIT_S) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def serves_as_before(front_end: FrontEnd, client: httpx.Client):
    """After all of it the same request has the same answer, and nothing is held anywhere."""
    before = known_answer(client)
    yield
    front_end.check_nothing_is_left()
    assert known_answer(client) == before


def post(client: httpx.Client, path: str, content: Any, headers: Any = JSON_TYPE) -> httpx.Response:
    answer = client.post(path, content=content, headers=headers)
    what = f"{path} {content[:1000]!r}" if isinstance(content, bytes) else path
    check_answer(what, answer.status_code, answer.headers, answer.content)
    return answer


def fuzz_bodies(front_end: FrontEnd, client: httpx.Client, data: st.DataObject, path: str) -> None:
    post(client, path, data.draw(almost_right(front_end.openapi, path)))


@pytest.mark.parametrize("path", BASES)
@quick(40)
@given(data=st.data())
def test_an_almost_right_body_is_answered_or_refused(
    front_end: FrontEnd, client: httpx.Client, data: st.DataObject, path: str
) -> None:
    fuzz_bodies(front_end, client, data, path)


@pytest.mark.parametrize("path", BASES)
@thorough(300)
@given(data=st.data())
def test_an_almost_right_body_is_answered_or_refused_at_length(
    front_end: FrontEnd, client: httpx.Client, data: st.DataObject, path: str
) -> None:
    fuzz_bodies(front_end, client, data, path)


FOUND = {
    "a constraint that is a list": {"structured_outputs": []},
    "a constraint that is a text": {"structured_outputs": "{}"},
    "a constraint that is a number": {"structured_outputs": 2.9e-140},
}
"""vLLM's own server answers 500 to these."""


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", FOUND)
def test_what_vllm_stumbles_over_is_the_clients_mistake(client: httpx.Client, name: str, path: str) -> None:
    answer = post(client, path, json.dumps({**BASES[path], **FOUND[name]}).encode())
    assert answer.status_code == 400
    assert "does not have the expected form" in answer.json()["error"]["message"]


def _completion(more: bytes) -> bytes:
    return b'{"model": "mock", "prompt": "Hello", "max_tokens": 2, ' + more + b"}"


ODD_BODIES: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"hello",
    "half": b'{"model": "mock", "prompt": ',
    "brackets": b"[" * DEEP,
    "deep lists": _completion(b'"stop": ' + b"[" * DEEP + b"]" * DEEP),
    "deep objects": _completion(b'"logit_bias": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "deep and unknown": _completion(b'"x": ' + b"[" * DEEP + b"]" * DEEP),
    "invalid UTF-8": _completion(b'"user": "\xff\xfe\xc3\x28"'),
    "half a surrogate": _completion(b'"user": "\\ud800"'),
    "a byte order mark": b"\xef\xbb\xbf" + _completion(b'"n": 1'),
    "UTF-16": _completion(b'"n": 1').decode().encode("utf-16"),
    "a thousand digits": _completion(b'"seed": ' + b"9" * 1000),
    "ten thousand digits": _completion(b'"seed": ' + b"9" * 10_000),
    "a huge exponent": _completion(b'"temperature": 1e999999'),
    "not a number": _completion(b'"temperature": NaN'),
    "infinite": _completion(b'"temperature": -Infinity'),
    "the same key twice": _completion(b'"n": 1, "n": "two", "prompt": 5'),
    "a thousand keys": _completion(b", ".join(b'"k%d": %d' % (i, i) for i in range(1000))),
    "a million spaces": _completion(b" " * 1_000_000 + b'"n": 1'),
}


@pytest.mark.parametrize(
    "path", [COMPLETIONS, CHAT, "/v1/responses", "/v1/messages", "/tokenize", "/baton/explain"]
)
@pytest.mark.parametrize("name", ODD_BODIES)
def test_odd_bytes_are_answered_or_refused(client: httpx.Client, name: str, path: str) -> None:
    answer = post(client, path, ODD_BODIES[name])
    assert answer.status_code in (200, 400, 404, 413, 422)


def fuzz_types_and_chunks(client: httpx.Client, kind: str, chunks: list[bytes]) -> None:
    post(client, COMPLETIONS, iter(chunks), {"content-type": kind} if kind else {})


_KINDS = st.sampled_from(
    [
        "",
        "application/json",
        "application/json; charset=latin-1",
        "application/json; charset=no-such",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "text/plain",
        "nonsense/",
        "x" * 2000,
    ]
)
_CHUNKS = st.one_of(
    st.lists(st.binary(max_size=20), max_size=5),
    st.integers(1, 20).map(lambda size: _cut(_completion(b'"n": 1'), size)),
)


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@example("multipart/form-data; boundary=x", [b"--x\r\n"])
@quick(60)
@given(_KINDS, _CHUNKS)
def test_other_types_and_chunks_are_answered_or_refused(
    client: httpx.Client, kind: str, chunks: list[bytes]
) -> None:
    fuzz_types_and_chunks(client, kind, chunks)


_LATIN = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=100
)
_NUMBERS = values.NUMBERS.map(str) | st.sampled_from(["nan", "inf", "-0", "1e400", "٣", " ", "1_0", "0x1"])
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "x-baton-tenant": _LATIN | st.just("t" * 5000),
        "x-baton-ttft-slo-ms": _NUMBERS | _LATIN,
        "x-baton-tpot-slo-ms": _NUMBERS | _LATIN,
        "x-baton-explain": _LATIN | st.sampled_from(["1", "true", "0"]),
        "x-baton-else": _LATIN,
        "authorization": _LATIN,
        "x-request-id": _LATIN | st.just("r" * 3000),
        "x-data-parallel-rank": _NUMBERS | _LATIN,
        "x-session-id": _LATIN,
        "traceparent": _LATIN | st.just("00-" + "0" * 32 + "-" + "0" * 16 + "-00"),
    },
)


def fuzz_headers(client: httpx.Client, headers: dict[str, str], stream: bool) -> None:
    raw = [(name.encode(), value.strip().encode("utf-8")) for name, value in headers.items()]
    body = json.dumps({**BASES[COMPLETIONS], "stream": stream}).encode()
    post(client, COMPLETIONS, body, [*raw, (b"content-type", b"application/json")])


@quick(80)
@given(HEADERS, st.booleans())
def test_headers_of_any_kind_are_taken_or_refused(
    client: httpx.Client, headers: dict[str, str], stream: bool
) -> None:
    fuzz_headers(client, headers, stream)


@thorough(500)
@given(HEADERS, st.booleans())
def test_headers_of_any_kind_are_taken_or_refused_at_length(
    client: httpx.Client, headers: dict[str, str], stream: bool
) -> None:
    fuzz_headers(client, headers, stream)
