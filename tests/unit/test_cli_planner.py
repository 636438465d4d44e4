"""baton planner: what it prints of the planner's answer, and its errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from deploy import cli
from router.planner_api import planner_routes

MOVE: dict[str, Any] = {
    "number": 42,
    "at_s": 1_700_000_000.0,
    "verdict": "move",
    "reason": "prompts are waiting",
    "split": "3P+5D",
    "role_changes": [
        {"worker_id": "h200-a", "shape": "h200", "role": "prefill"},
        {"worker_id": "h200-b", "shape": "h200", "role": "prefill"},
    ],
    "counts": {"h200": 8},
    "inputs": {"rate_rps": 12.345678, "decode_use": None},
    "alternatives": [
        {"split": "3P+5D", "num_gpus": 8.0, "attainment": 0.987, "score": 11.9},
        {"split": "1P+7D", "num_gpus": 8.0, "attainment": 0.41, "score": 5.0},
    ],
    "cpu_s": 0.0125,
    "carried_out": True,
    "failures": ["h200-b to prefill: no worker 'h200-b' in the cluster"],
}
HOLD = {
    **MOVE,
    "number": 43,
    "verdict": "hold",
    "role_changes": [],
    "counts": {},
    "failures": [],
    "reason": "[it] holds",
}
ANSWER: dict[str, Any] = {
    "model": "m",
    "mode": "auto",
    "interval_s": 1.0,
    "started_at_s": 1_700_000_000.0,
    "observation_age_s": 0.4,
    "trouble": None,
    "step_time_factors": [{"shape": "h200", "role": "decode", "phase": "decode", "factor": 1.257}],
    "decisions": [MOVE, HOLD],
}


class Router:
    """Answers /baton/planner with what it is given, and notes what it was asked."""

    def __init__(self) -> None:
        self.status, self.answer = 200, ANSWER
        self.asked: list[dict[str, list[str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = urlparse(self.path)
                assert asked.path == "/baton/planner"
                outer.asked.append(parse_qs(asked.query))
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(json.dumps(outer.answer).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def router() -> Iterator[Router]:
    made = Router()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def wide_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TZ", "UTC")


def baton(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["planner", *(str(argument) for argument in arguments)])


def test_history_has_a_line_for_each_decision_with_what_it_changed_and_why(router: Router) -> None:
    result = baton("history", router.url, "--last", 7, "--moves")
    assert result.exit_code == 0, result.output
    assert router.asked == [{"last": ["7"], "moves": ["true"]}]
    (move,) = [line for line in result.stdout.splitlines() if " 42 " in line]
    for part in ("11-14 22:13:20", "move (in part)", "3P+5D", "2 to prefill, h200 x 8", "rate_rps 12.35"):
        assert part in move
    assert "prompts are waiting" in move
    (hold,) = [line for line in result.stdout.splitlines() if " 43 " in line]
    assert "[it] holds" in hold


def test_advice_is_called_advice(router: Router) -> None:
    move = {**MOVE, "carried_out": False, "failures": []}
    router.answer = {**ANSWER, "mode": "advise", "decisions": [move]}
    assert "move (advised)" in baton("history", router.url).stdout


def test_one_decision_is_shown_whole(router: Router) -> None:
    router.answer = {**ANSWER, "decisions": [MOVE]}
    result = baton("history", router.url, "--number", 42)
    assert router.asked[0]["number"] == ["42"]
    for part in (
        "h200-a becomes a prefill worker",
        "h200: 8 workers",
        "failed: h200-b",
        "98.7%",
        "41.0%",
        "11.9",
    ):
        assert part in result.stdout


def test_status_shows_mode_last_decision_and_what_was_learned(router: Router) -> None:
    router.answer = {**ANSWER, "trouble": "observe: no answer in time", "decisions": [MOVE]}
    result = baton("status", router.url)
    for part in ("mode auto", "holds: observe: no answer in time", "decision 42", "12.5 ms", "1.26"):
        assert part in result.stdout


@pytest.mark.parametrize("command", ["history", "status"])
def test_json_is_the_planners_answer(router: Router, command: str) -> None:
    assert json.loads(baton(command, router.url, "--json").stdout) == ANSWER


@pytest.mark.parametrize("command", ["history", "status"])
def test_a_planner_that_is_off_is_said_to_be(router: Router, command: str) -> None:
    router.answer = {"mode": "off", "decisions": []}
    assert "the planner is off" in baton(command, router.url).stdout


@pytest.mark.parametrize(
    ("status", "detail", "exit_code"),
    [(404, "the planner has no decision 9 in its history", 2), (503, "the planner does not answer", 1)],
)
def test_a_refusal_is_one_line(router: Router, status: int, detail: str, exit_code: int) -> None:
    router.status, router.answer = status, {"detail": detail}
    result = baton("history", router.url, "--number", 9)
    assert result.exit_code == exit_code
    assert result.stderr == f"error: {detail}\n"


def test_nobody_there_is_one_line() -> None:
    result = baton("status", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "no Baton router answers at http://127.0.0.1:9/baton/planner" in result.stderr


@pytest.mark.parametrize("command", ["history", "status"])
def test_the_help_has_examples(command: str) -> None:
    assert f"baton planner {command}" in baton(command, "--help").stdout.split("Example")[1]


# The router's side.


def client_of(answer: dict[str, Any] | Exception | None) -> tuple[TestClient, list[tuple[Any, ...]]]:
    asked: list[tuple[Any, ...]] = []

    async def ask(last: int, number: int | None, moves: bool) -> dict[str, Any] | None:
        asked.append((last, number, moves))
        if isinstance(answer, Exception):
            raise answer
        return answer

    app = FastAPI()
    app.include_router(planner_routes(ask))
    return TestClient(app), asked


def test_the_router_hands_the_question_on() -> None:
    client, asked = client_of(ANSWER)
    assert client.get("/baton/planner?last=3&moves=true").json() == ANSWER
    assert client.get("/baton/planner?number=42").status_code == 200
    assert asked == [(3, None, True), (20, 42, False)]
    assert client.get("/baton/planner?last=1001").status_code == 422


def test_the_router_says_why_there_is_no_answer() -> None:
    assert client_of(None)[0].get("/baton/planner").json() == {"mode": "off", "decisions": []}
    gone = client_of(ConnectionError("it died"))[0].get("/baton/planner")
    assert (gone.status_code, "does not answer" in gone.json()["detail"]) == (503, True)
    unknown = client_of({**ANSWER, "decisions": []})[0].get("/baton/planner?number=9")
    assert (unknown.status_code, unknown.json()["detail"]) == (
        404,
        "the planner has no decision 9 in its history",
    )
