"""What any HTTP answer of the router has to be, and a request whose answer is known."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

LIMIT_S = 30.0
REFUSALS = {501, 503}
"""The only statuses from 500 on: not implemented here, and nobody to take it now."""
_KINDS = ("application/json", "text/event-stream", "text/plain")
_ERROR_IN_STREAM = re.compile(rb'"code": ?5\d\d')
KNOWN = {"model": "mock", "prompt": "What is a list?", "max_tokens": 5, "temperature": 0}


def check_answer(what: Any, status: int, headers: Any, content: bytes) -> None:
    """Fails on an error of the server's own, and on an answer that no client could read."""
    assert status < 500 or status in REFUSALS, f"{what}: {status} {content[:600]!r}"
    kind = headers.get("content-type") or ""
    kind = kind[0] if isinstance(kind, list) else kind
    assert not content or kind.startswith(_KINDS), f"{what}: content type {kind!r}"
    if kind.startswith("application/json") and content:
        body = json.loads(content)
        if status >= 400:
            assert isinstance(body, dict), f"{what}: {content[:300]!r}"
            assert {"error", "detail", "message"} & body.keys(), f"{what}: {content[:300]!r}"
    elif kind.startswith("text/event-stream"):
        assert not _ERROR_IN_STREAM.search(content), f"{what}: {content[-600:]!r}"


def known_answer(client: httpx.Client) -> str:
    """The text that always follows the same prompt."""
    answer = client.post("/v1/completions", json=KNOWN, timeout=LIMIT_S)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])
