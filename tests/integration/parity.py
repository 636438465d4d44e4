"""Is the cluster's answer plain vLLM's answer? Streams are put together first, then field by field."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from tests.integration.served import Answer, Body, Served, ServedByBaton

LOGPROB_TOLERANCE = 1e-3
_MINTED = frozenset(
    {"id", "item_id", "response_id", "created", "created_at", "request_id", "system_fingerprint"}
)
"""Fields that are new in every answer."""
_JOINED = ("content", "reasoning", "reasoning_content", "text", "arguments")
"""Fields whose pieces are strings to put together."""


def same_answer(
    cluster: ServedByBaton, plain: Served, path: str, body: Body
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Asks both, fails unless the answers are the same.

    Returns:
        The answer, put together if it was a stream, and the cluster's trace of the request.
    """
    theirs, ours = plain.post(path, body), cluster.post(path, body)
    assert theirs.status == 200, theirs.body
    assert ours.status == 200, ours.body
    assert differences(complete(ours), complete(theirs)) == []
    return complete(ours), cluster.trace(ours.id)


def check_path(trace: dict[str, Any], path: str) -> None:
    """That the request took ``path`` and that KV crossed over NIXL exactly if that path says so."""
    assert (trace["path"], trace["fallbacks"]) == (path, []), trace
    if path in ("remote", "remote_early"):
        assert trace["kv_outcome"] == "pulled"
        assert trace["kv_bytes"] > 0
    else:
        assert trace["kv_outcome"] == ""
        assert trace["kv_bytes"] == 0


def differences(ours: Any, theirs: Any, where: str = "answer") -> list[str]:
    """Every place where two answers differ: numbers that are floats by more than the tolerance."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted((ours.keys() | theirs.keys()) - _MINTED)
        missing = [f"{where}.{key}: only one has it" for key in keys if (key in ours) != (key in theirs)]
        both = [key for key in keys if key in ours and key in theirs]
        return missing + [d for key in both for d in differences(ours[key], theirs[key], f"{where}.{key}")]
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return [f"{where}: {len(ours)} against {len(theirs)} items: {ours!r:.300} {theirs!r:.300}"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for index, (a, b) in pairs for d in differences(a, b, f"{where}[{index}]")]
    if isinstance(ours, float) and isinstance(theirs, float):
        same = math.isclose(ours, theirs, rel_tol=0, abs_tol=LOGPROB_TOLERANCE)
    else:
        same = ours == theirs and type(ours) is type(theirs)
    return [] if same else [f"{where}: {ours!r:.300} against {theirs!r:.300}"]


def complete(answer: Answer) -> Any:
    """The body, or what a chat or completion stream's chunks add up to."""
    if not answer.events:
        return answer.body
    whole: dict[str, Any] = {"choices": {}, "usage": None, "done": answer.done}
    for event in answer.events:
        if "error" in event:
            whole["error"] = event["error"]
            continue
        for key in event.keys() - {"choices", "usage"}:
            if whole.get(key) is None:
                whole[key] = event[key]
        whole["usage"] = event.get("usage") or whole["usage"]
        for piece in event["choices"]:
            _add(whole["choices"].setdefault(piece["index"], {}), piece)
    whole["choices"] = [whole["choices"][index] for index in sorted(whole["choices"])]
    return whole


def _add(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    """Adds one chunk's part of a choice to what came before it."""
    for key, value in piece.items():
        before = choice.get(key)
        if value is None:
            choice.setdefault(key, None)
        elif before is None:
            choice[key] = _own(value)
        elif key in _JOINED:
            choice[key] = before + value
        elif key == "tool_calls":
            _add_tool_calls(before, value)
        elif isinstance(value, dict):
            _add(before, value)
        elif isinstance(value, list):
            before.extend(value)
        else:
            choice[key] = value


def _add_tool_calls(calls: list[dict[str, Any]], pieces: Iterable[dict[str, Any]]) -> None:
    for piece in pieces:
        known = next((call for call in calls if call["index"] == piece["index"]), None)
        if known is None:
            calls.append(_own(piece))
        else:
            _add(known, piece)


def _own(value: Any) -> Any:
    """A copy that further pieces may be added to."""
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return [_own(item) for item in value] if isinstance(value, list) else value
