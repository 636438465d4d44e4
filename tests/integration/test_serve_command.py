"""`baton serve` in the background and in the foreground, from start to end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI, OpenAIError

from tests.integration.baton_command import BIN, Commands, mock_config
from tests.integration.server_process import HOST, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(200)]


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    yield commands
    left = commands.left_running()
    commands.end_all()
    assert left == []


class Stream(threading.Thread):
    """A streamed answer of ``num_tokens`` tokens, read in a thread of its own."""

    def __init__(self, url: str, num_tokens: int) -> None:
        super().__init__()
        self._url = url
        self._num_tokens = num_tokens
        self.begun = threading.Event()
        self.finish_reason: str | None = None
        self.num_tokens = 0
        self.broke = False

    def run(self) -> None:
        try:
            self._read()
        except OpenAIError:
            self.broke = True

    def _read(self) -> None:
        with OpenAI(base_url=self._url, api_key="none", max_retries=0) as client:
            for chunk in client.chat.completions.create(
                model="mocked",
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=self._num_tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            ):
                self.begun.set()
                if chunk.choices:
                    self.finish_reason = chunk.choices[0].finish_reason
                elif chunk.usage:
                    self.num_tokens = chunk.usage.completion_tokens


def test_in_the_background_until_stop_which_lets_a_stream_finish(
    commands: Commands, model_path: Path
) -> None:
    port = free_port()
    config = commands.write_config(mock_config(model_path, port))
    started = commands.run("serve", config, "--detach")
    assert started.returncode == 0, started.stderr
    assert f"ready: http://{HOST}:{port}/v1" in started.stdout
    assert f"baton stop {port}" in started.stdout

    status = commands.run("status")
    assert status.returncode == 0
    assert status.stdout.count("ready") >= 2

    again = commands.run("serve", config)
    assert again.returncode == 2
    assert "cannot listen" in again.stderr

    stream = Stream(f"http://{HOST}:{port}/v1", num_tokens=120)
    stream.start()
    assert stream.begun.wait(20)
    stopped = commands.run("stop")
    stream.join()
    assert stopped.returncode == 0
    assert f"stopped http://{HOST}:{port}" in stopped.stdout
    assert (stream.finish_reason, stream.num_tokens) == ("length", 120)
    assert commands.left_running() == []
    assert commands.run("status").returncode == 1


def test_in_the_foreground_a_second_interrupt_ends_at_once(commands: Commands, model_path: Path) -> None:
    port = free_port()
    config = commands.write_config(mock_config(model_path, port))
    # As from a terminal: its Ctrl-C goes to the whole process group.
    serving = subprocess.Popen(
        [BIN / "baton", "serve", config],
        env=commands.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with serving:
        assert serving.stdout is not None
        assert any(line.startswith("ready: ") for line in serving.stdout)
        stream = Stream(f"http://{HOST}:{port}/v1", num_tokens=2000)
        stream.start()
        assert stream.begun.wait(20)
        os.killpg(serving.pid, signal.SIGINT)
        time.sleep(2)
        assert serving.poll() is None
        os.killpg(serving.pid, signal.SIGINT)
        interrupted_s = time.monotonic()
        assert serving.wait(30) != 0
        assert time.monotonic() - interrupted_s < 15
        stream.join()
        assert stream.broke
    assert commands.left_running() == []
