"""The baton command: what it prints, where, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy import cli, detached, job
from deploy.config import parse_config

CONFIG: dict[str, Any] = {
    "models": [
        {
            "name": "tiny",
            "path": "some/model",
            "slo": {"ttft_ms": 100, "tpot_ms": 10},
            "shapes": [
                {
                    "name": "mocks",
                    "count": 3,
                    "initial": {"prefill": 1, "decode": 2},
                    "gpus_per_worker": 0,
                    "engine": "mock",
                }
            ],
        }
    ],
    "router": {"port": 8123},
}
WORKER: dict[str, Any] = {
    "worker_id": "mocks-abc",
    "shape": "mocks",
    "model": "tiny",
    "role": "decode",
    "state": "ready",
    "address": "127.0.0.1:4000",
    "num_requests": 3,
    "waiting_prefill_tokens": 70,
    "kv_used_blocks": 25,
    "num_kv_blocks": 100,
    "num_pinned": 2,
}


@pytest.fixture(autouse=True)
def own_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("BATON_LOG_LEVEL", raising=False)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def router() -> Iterator[str]:
    """Something that answers /baton/status as a router does; the value is its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/baton/status" else 404)
            self.end_headers()
            prefill = {**WORKER, "worker_id": "mocks-xyz", "role": "prefill", "state": "unreachable"}
            prefill["trouble"] = "its engine has not answered for 20 s"
            node = {"shape": "mocks", "node_id": "a" * 56, "num_deaths": 4, "last_reason": "its engine died"}
            answer = {"epoch": 1, "workers": [WORKER, prefill], "suspect_nodes": [node]}
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def baton(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


# Help.


@pytest.mark.parametrize("command", ["serve", "status", "validate", "stop", "demo"])
def test_the_help_of_every_command_has_an_example(command: str) -> None:
    result = baton(command, "--help")
    assert result.exit_code == 0
    assert f"baton {command}" in result.stdout.split("Example")[1]


def test_the_command_starts_without_importing_ray_or_vllm() -> None:
    code = "import deploy.cli, sys; print({'ray', 'vllm', 'torch', 'openai', 'pydantic'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_an_unknown_command_is_a_usage_error() -> None:
    result = baton("sevre")
    assert result.exit_code == 2
    assert "sevre" in result.stderr


# validate.


def test_validate_says_in_one_line_what_a_right_file_describes(config_file: Path) -> None:
    result = baton("validate", config_file)
    assert result.exit_code == 0
    assert result.stdout == (
        f"ok {config_file}: model tiny, workers 3 x mocks (1 prefill, 2 decode), port 8123\n"
    )
    assert result.stderr == ""


def test_validate_notes_a_model_that_is_not_on_this_machine(config_file: Path) -> None:
    config_file.write_text(config_file.read_text().replace("some/model", "/nowhere/model"))
    result = baton("validate", config_file)
    assert result.exit_code == 0
    assert "note: on this machine, models[0].path: /nowhere/model" in result.stderr


def test_validate_lists_every_problem_and_nothing_else(config_file: Path) -> None:
    wrong = {**CONFIG, "router": {"prot": 1}, "planner": {"mode": "magic"}}
    config_file.write_text(json.dumps(wrong))
    result = baton("validate", config_file)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"error: {config_file}: router.prot: unknown key; did you mean port?",
        f"{config_file}: planner.mode: must be 'off', 'advise' or 'auto', not 'magic'",
    ]


@pytest.mark.parametrize("command", ["validate", "serve", "status"])
def test_a_missing_file_is_one_message(command: str, tmp_path: Path) -> None:
    result = baton(command, tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}/none.yaml: no such file\n"


def test_tracebacks_are_for_debugging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_LOG_LEVEL", "DEBUG")
    result = baton("validate", tmp_path / "none.yaml")
    assert type(result.exception).__name__ == "ConfigError"


# status.


def test_status_shows_pools_and_workers(router: str) -> None:
    result = baton("status", router)
    assert result.exit_code == 0, result.stderr
    rows = [line.replace("│", " ").replace("┃", " ").split() for line in result.stdout.splitlines()]
    assert ["tiny", "prefill", "1", "0", "3", "70", "25%", "2"] in rows
    assert ["tiny", "decode", "1", "1", "3", "70", "25%", "2"] in rows
    assert ["mocks-abc", "mocks", "decode", "ready", "127.0.0.1:4000", "3", "25%", "2"] in rows


def test_status_says_who_is_not_trusted_and_why(router: str) -> None:
    output = baton("status", router).stdout
    assert "mocks-xyz is quarantined: its engine has not answered for 20 s" in output
    assert f"workers of shape mocks keep dying on node {'a' * 12}: 4 in the last minutes" in output
    assert "its engine died" in output


def test_status_as_json_is_the_routers_answer(router: str) -> None:
    result = baton("status", router, "--json")
    assert json.loads(result.stdout)["workers"][0] == WORKER


def test_status_of_nothing_is_one_line(config_file: Path) -> None:
    unused = CONFIG["router"]["port"]
    for target in (unused, f"http://127.0.0.1:{unused}/v1", config_file):
        result = baton("status", target)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: no Baton router answers at http://127.0.0.1:{unused}: ")


# Clusters in the background.


def remember(process: subprocess.Popen[bytes], *, port: int = 8123, **changes: Any) -> detached.DetachedRun:
    """Records a process as a background cluster."""
    known = {
        "port": port,
        "pid": process.pid,
        "start_ticks": detached._start_ticks(process.pid),
        "url": f"http://127.0.0.1:{port}",
        "config": "cluster.yaml",
        "log": "serve.log",
        "stop_timeout_s": 5.0,
        **changes,
    }
    folder = detached.state_dir() / str(port)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(known))
    run = detached.find(port)
    assert run is not None
    return run


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def sleeper(processes: list[subprocess.Popen[bytes]], **options: Any) -> subprocess.Popen[bytes]:
    processes.append(subprocess.Popen(["sleep", "100"], **options))
    return processes[-1]


def test_stop_says_when_nothing_runs() -> None:
    result = baton("stop")
    assert result.exit_code == 0
    assert result.stdout == "nothing to stop: no cluster runs in the background\n"


def test_stop_ends_the_recorded_process_and_forgets_it(processes: list[subprocess.Popen[bytes]]) -> None:
    run = remember(sleeper(processes))
    assert run.alive
    result = baton("stop")
    assert result.exit_code == 0
    assert result.stdout == f"stopped http://127.0.0.1:8123 (process {run.pid})\n"
    assert not run.alive
    assert detached.find_all() == []


def test_stop_leaves_a_process_alone_that_only_has_the_same_id(
    processes: list[subprocess.Popen[bytes]],
) -> None:
    process = sleeper(processes)
    remember(process, start_ticks=1)
    result = baton("stop", 8123)
    assert result.exit_code == 0
    assert "had ended already" in result.stdout
    assert process.poll() is None
    assert detached.find(8123) is None


def test_stop_ends_what_a_dead_cluster_left_behind(processes: list[subprocess.Popen[bytes]]) -> None:
    left = sleeper(processes, env={"BATON_CLUSTER_RUN": "some-mark"})
    other = sleeper(processes, env={"BATON_CLUSTER_RUN": "other-mark"})
    dead = sleeper(processes)
    remember(dead, mark="some-mark")
    dead.kill()
    dead.wait()
    assert "had ended already" in baton("stop").stdout
    assert left.poll() is not None
    assert other.poll() is None


def test_stop_insists(processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached, "_KILL_AFTER_S", 0.2)
    stubborn = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; echo ready; while true; do sleep 0.1; done"], stdout=subprocess.PIPE
    )
    processes.append(stubborn)
    assert stubborn.stdout is not None
    with stubborn.stdout as ready:
        ready.readline()
    remember(stubborn, stop_timeout_s=0.2)
    assert baton("stop").exit_code == 0
    assert stubborn.poll() is not None


def test_with_several_in_the_background_a_port_is_asked_for(
    processes: list[subprocess.Popen[bytes]],
) -> None:
    for port in (8123, 8124):
        remember(sleeper(processes), port=port)
    for command in ("stop", "status"):
        result = baton(command)
        assert result.exit_code == 2
        assert "name a port: 8123, 8124" in result.stderr
    assert baton("stop", 8124).exit_code == 0
    assert [run.port for run in detached.find_all()] == [8123]


def test_a_second_start_on_a_port_is_refused(
    config_file: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    run = remember(sleeper(processes))
    result = baton("serve", "--detach", config_file)
    assert result.exit_code == 1
    assert f"a cluster runs at {run.url} already" in result.stderr


def test_a_background_start_that_fails_shows_the_one_error(config_file: Path) -> None:
    """Through the real child process, which fails before it starts Ray."""
    config_file.write_text(config_file.read_text().replace("some/model", "/nowhere/model"))
    result = baton("serve", "--detach", config_file)
    assert result.exit_code == 2
    assert result.stderr == "error: models[0].path: /nowhere/model is not a directory with a config.json\n"
    assert detached.find_all() == []


# Ray jobs.


def test_a_job_joins_the_cluster_it_is_in_unless_told_otherwise() -> None:
    config = parse_config(CONFIG)
    assert job.inside_cluster(config).ray.address == "auto"
    named = parse_config({**CONFIG, "ray": {"address": "10.0.0.1:6379"}})
    assert job.inside_cluster(named) == named


def test_a_job_without_a_configuration_says_how_to_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main([]) == 2
    assert capsys.readouterr().err == "usage: python -m deploy.job CONFIG\n"


def test_a_job_with_a_wrong_configuration_ends_with_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert job.main([str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none.yaml: no such file\n"
