"""What the fault benchmark calls right, wrong and failed, and how it reads a worker's metrics."""

from __future__ import annotations

import json

import pytest

from benchmarks.fault_client import Ask, Fate, Outcome, Said, judge
from benchmarks.fault_systems import Held, vllm_held

EXPECTED = Said("abcdef", "length", 3)


def stream(*pieces: str, reason: str | None = "length", output_tokens: int = 3) -> list[str]:
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    if reason is not None:
        events.append({"choices": [{"delta": {}, "finish_reason": reason}]})
        events.append({"choices": [], "usage": {"completion_tokens": output_tokens}})
    return [f"data: {json.dumps(event)}" for event in events]


def whole(text: str) -> list[str]:
    choice = {"message": {"content": text}, "finish_reason": "length"}
    return [json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}})]


@pytest.mark.parametrize(
    ("lines", "status", "error", "fate", "why"),
    [
        (stream("ab", "cd", "ef"), 200, "", Fate.RIGHT, ""),
        (stream("ab", "ab", "cd", "ef"), 200, "", Fate.WRONG, "text differs after 2 of 6 characters"),
        (
            stream("ab", "cd", "ef", output_tokens=4),
            200,
            "",
            Fate.WRONG,
            "4 tokens, length, with the text of 3 tokens",
        ),
        (stream("ab", reason=None), 200, "", Fate.FAILED, "end without finish reason in mid-stream"),
        (stream("ab", reason=None), 200, "connection cut", Fate.FAILED, "connection cut in mid-stream"),
        (stream("ax", reason=None), 200, "connection cut", Fate.WRONG, "connection cut in mid-stream"),
        (stream(reason="error"), 200, "", Fate.FAILED, "finish reason 'error' before a token"),
        (['data: {"error": {"message": "no"}}'], 200, "", Fate.FAILED, "error event before a token"),
        (["no"], 503, "", Fate.FAILED, "HTTP 503"),
        ([], 0, "no answer (ConnectError)", Fate.FAILED, "no answer (ConnectError)"),
    ],
)
def test_a_stream_is_judged_by_its_text_its_end_and_its_count(
    lines: list[str], status: int, error: str, fate: Fate, why: str
) -> None:
    outcome = Outcome(Ask({"stream": True}, EXPECTED))
    judge(outcome, status, lines, error)
    assert outcome.fate is fate
    assert outcome.why.startswith(why)
    assert bool(outcome.why) == bool(why)


@pytest.mark.parametrize(
    ("lines", "fate"),
    [(whole("abcdef"), Fate.RIGHT), (whole("abc"), Fate.WRONG), (["{}"], Fate.FAILED)],
)
def test_a_whole_answer_is_judged_by_its_text(lines: list[str], fate: Fate) -> None:
    outcome = Outcome(Ask({}, EXPECTED))
    judge(outcome, 200, lines, "")
    assert outcome.fate is fate


def test_a_vllm_servers_metrics_say_what_it_holds() -> None:
    metrics = (
        'vllm:num_requests_running{engine="0",model_name="bench"} 2.0\n'
        'vllm:num_requests_waiting{engine="0",model_name="bench"} 1.0\n'
        'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 1.0\n'
        f'vllm:kv_cache_usage_perc{{engine="0",model_name="bench"}} {12 / 383}\n'
    )
    assert vllm_held(metrics) == Held(kv_blocks=12, requests=3)
    assert not vllm_held("")
