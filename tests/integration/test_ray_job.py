"""Baton as a job of a Ray cluster that somebody else runs."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from deploy.config import parse_config
from deploy.environment import ray_environment
from tests.integration.baton_command import BIN, Commands, mock_config
from tests.integration.ray_head import READY
from tests.integration.server_process import HOST, ServerProcess, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

_SUBMISSION = "baton-test"


class Jobs:
    """Ray's own command line against one job server."""

    def __init__(self, commands: Commands, address: str) -> None:
        self._commands = commands
        self._address = address

    def __call__(self, action: str, *arguments: object) -> str:
        command = (BIN / "ray", "job", action, "--address", self._address, *arguments)
        done = self._commands.run_any(*command, timeout_s=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *entry_point: object, timeout_s: float = 60) -> None:
        """Submits a job; a head that has just started has no agent yet to take it."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self("submit", "--no-wait", "--submission-id", _SUBMISSION, "--", *entry_point)
                return
            except AssertionError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline_s:
                    raise
                time.sleep(1)

    def wait_until(self, reached: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline_s, self("logs", _SUBMISSION)
            time.sleep(0.5)


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    config = parse_config(mock_config(tmp_path, 1))
    # HAProxy's paths, which may not be long, and ports; whether it is used is for the job to say.
    haproxy_dir = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
    own = {k: v for k, v in ray_environment(config, haproxy_dir).items() if k != "RAY_SERVE_ENABLE_HA_PROXY"}
    # A token of the test's own, or Ray would put one into the user's home and the command line not find it.
    commands = Commands(tmp_path, {**own, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex})
    yield commands
    left = commands.left_running()
    commands.end_all()
    shutil.rmtree(haproxy_dir)
    assert left == []


@pytest.fixture
def jobs(commands: Commands, tmp_path: Path) -> Iterator[Jobs]:
    port = free_port()
    head = ServerProcess(
        "the Ray head",
        [sys.executable, "-m", "tests.integration.ray_head", str(port)],
        commands.environment,
        tmp_path / "head.log",
    )
    try:
        head.wait_until(lambda: READY in head.log_tail(), 60)
        yield Jobs(commands, f"http://{HOST}:{port}")
    finally:
        head.stop(grace_s=15)


def test_a_submitted_job_serves_until_it_is_stopped(jobs: Jobs, commands: Commands, model_path: Path) -> None:
    url = f"http://{HOST}:{(port := free_port())}"
    config = commands.write_config(mock_config(model_path, port, drain_timeout_s=2))
    entry_point = (sys.executable, "-m", "deploy.job", config)
    jobs.submit(*entry_point)
    jobs.wait_until(lambda: _answers(url), 120)
    jobs.wait_until(lambda: f"ready: {url}/v1" in jobs("logs", _SUBMISSION), 60)

    request = {"model": "mocked", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    answer = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=20).json()
    assert answer["usage"]["completion_tokens"] == 4
    trace = httpx.get(f"{url}/baton/requests/{answer['id']}").json()
    assert trace["path"] == "remote_early"
    assert any("haproxy" in command for command in commands.left_running(grace_s=0))

    jobs("stop", _SUBMISSION)
    assert "was stopped" in jobs("status", _SUBMISSION)
    jobs.wait_until(lambda: not _answers(url), 60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
