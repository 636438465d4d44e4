"""What cannot start says why in one message, soon, and leaves nothing running."""

from __future__ import annotations

import copy
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.baton_command import Commands, mock_config
from tests.integration.server_process import HOST, free_port

pytestmark = [pytest.mark.engine, pytest.mark.fault_row(19)]

_AT_ONCE_S = 15.0
"""Before Ray starts; generous for a busy machine."""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    yield commands
    left = commands.left_running()
    commands.end_all()
    assert left == []


def serve(commands: Commands, config: dict[str, Any], timeout_s: float = _AT_ONCE_S) -> tuple[int, str]:
    """Exit status and message of ``baton serve``, which must print no traceback."""
    result = commands.run("serve", commands.write_config(config), timeout_s=timeout_s)
    assert "Traceback" not in result.stdout + result.stderr
    return result.returncode, result.stderr


def test_a_busy_port(commands: Commands, model_path: Path) -> None:
    with socket.create_server((HOST, 0)) as busy:
        port = busy.getsockname()[1]
        status, message = serve(commands, mock_config(model_path, port))
    assert status == 2
    assert message == (
        f"error: router.port: cannot listen on {HOST}:{port} (Address already in use); "
        "stop what listens there or choose another port\n"
    )


def test_a_missing_model_directory(commands: Commands, tmp_path: Path) -> None:
    status, message = serve(commands, mock_config(tmp_path / "no-model", free_port()))
    assert status == 2
    assert message == f"error: models[0].path: {tmp_path}/no-model is not a directory with a config.json\n"


def test_a_wrong_key_and_a_wrong_type_together(commands: Commands, model_path: Path) -> None:
    config = mock_config(model_path, free_port())
    config["models"][0]["shapes"][0]["cuont"] = 2
    config["router"]["replicas"] = "two"
    status, message = serve(commands, config)
    assert status == 2
    assert [line.split("yaml: ")[1] for line in message.splitlines()] == [
        "models[0].shapes[0].cuont: unknown key; did you mean count?",
        "router.replicas: must be a whole number, not 'two'",
    ]


def test_parts_that_do_not_fit_together(commands: Commands, model_path: Path) -> None:
    config = mock_config(model_path, free_port())
    mocks = config["models"][0]["shapes"][0]
    engines = {**copy.deepcopy(mocks), "name": "cpu", "engine": "vllm", "engine_args": {"seed": 1}}
    del engines["mock"]
    config["models"][0]["shapes"].append(engines)
    mocks["initial"]["decode"] = 5
    status, message = serve(commands, config)
    assert status == 2
    assert [line.split("yaml: ")[1] for line in message.splitlines()] == [
        "models[0].shapes[0].initial: prefill 1 + decode 5 is not 2, the count; make them equal",
        "models[0].shapes[1].gpus_per_worker: is 0, but kv_transfer.buffer_device is 'cuda'; "
        "CPU workers need buffer_device: cpu",
    ]


def test_no_ray_cluster_to_join(commands: Commands, model_path: Path) -> None:
    config = mock_config(model_path, free_port(), ray={"address": f"{HOST}:{free_port()}"})
    status, message = serve(commands, config)
    assert status == 1
    assert f"error: ray.address: nobody answers at {config['ray']['address']}: " in message


@pytest.mark.timeout(150)
def test_an_engine_that_refuses_its_arguments(commands: Commands, model_path: Path) -> None:
    """Found by the engine itself, after Ray has started."""
    config = mock_config(model_path, free_port(), kv_transfer={"buffer_device": "cpu"})
    (shape,) = config["models"][0]["shapes"]
    del shape["mock"]
    shape |= {"engine": "vllm", "engine_args": {"max_model_len": 10**6}}
    started_s = time.monotonic()
    status, message = serve(commands, config, timeout_s=120)
    assert status == 1
    assert message.count("error: ") == 1
    assert "max_model_len (1000000) is greater" in message.split("error: ")[1]
    assert "logs of every process: " in message
    assert time.monotonic() - started_s < 90
