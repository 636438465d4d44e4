"""How long a start or a change may take, by what Ray Serve says of the replicas."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import StartupError
from deploy import serve_app
from deploy.settings import APP_NAME

TIMEOUT_S = 10.0
States = dict[str, int]


def status(states: States, name: str) -> Any:
    worker = SimpleNamespace(replica_states=states, message="no GPU is free", status="UPDATING")
    application = SimpleNamespace(status=name, message="", deployments={"Worker": worker})
    return SimpleNamespace(applications={APP_NAME: application})


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Goes through states of the replicas, one a second, and stays with the last."""
    from ray import serve

    past = SimpleNamespace(now_s=0.0, states=[{}], last="DEPLOYING")

    def now_status() -> Any:
        second = min(int(past.now_s), len(past.states) - 1)
        done = second == len(past.states) - 1
        return status(past.states[second], past.last if done else "DEPLOYING")

    def sleep(seconds: float) -> None:
        past.now_s += seconds

    monkeypatch.setattr(serve, "status", now_status)
    monkeypatch.setattr(serve_app, "time", SimpleNamespace(monotonic=lambda: past.now_s, sleep=sleep))
    return past


def one_by_one(num_workers: int, seconds: int) -> Sequence[States]:
    """Each worker is replaced within this time, after the one before."""
    starting, running = {"RUNNING": num_workers - 1, "STARTING": 1}, {"RUNNING": num_workers}
    return num_workers * [*[starting] * (seconds - 1), running]


def wait(num_workers: int) -> list[str]:
    lines: list[str] = []
    counts = {"Worker": range(num_workers, num_workers + 1)}
    serve_app.wait_running(counts, TIMEOUT_S, lines.append, ran_before=True)
    return lines


def test_each_replica_has_its_time_in_a_change_of_one_after_the_other(serve: Any) -> None:
    serve.states, serve.last = one_by_one(4, 9), "RUNNING"
    assert wait(4) == ["3 of 4 replicas run", "4 of 4 replicas run"]
    assert serve.now_s == pytest.approx(35, abs=1)


def test_a_replica_that_does_not_start_ends_the_wait_and_says_why(serve: Any) -> None:
    serve.states = [*one_by_one(4, 9)[:18], {"RUNNING": 3, "STARTING": 1}]
    with pytest.raises(StartupError, match="Worker: no GPU is free"):
        wait(4)
    assert serve.now_s == pytest.approx(17 + TIMEOUT_S, abs=1)


def test_replicas_that_start_and_die_again_and_again_end_it_too(serve: Any) -> None:
    serve.states = 100 * one_by_one(2, 9)
    with pytest.raises(StartupError):
        wait(2)
    assert serve.now_s <= 3 * TIMEOUT_S
