"""Whatever is killed, nothing that belonged to it lives on; what can come back comes back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration.baton_command import Commands, mock_config
from tests.integration.server_process import HOST, free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

GONE_WITHIN_S = 10.0
BACK_WITHIN_S = 60.0
ENDED_WITHIN_S = 20.0


class BackgroundCluster:
    """Started by ``baton serve --detach``."""

    def __init__(self, commands: Commands, model_path: Path) -> None:
        self.port = free_port()
        config = commands.write_config(mock_config(model_path, self.port))
        started = commands.run("serve", config, "--detach")
        assert started.returncode == 0, started.stderr
        self._commands = commands

    def processes(self) -> list[psutil.Process]:
        return self._commands.processes()

    def find(self, *words: str) -> psutil.Process:
        """The process whose command line has all the words."""
        found = [each for each in self.processes() if all(word in _title(each) for word in words)]
        assert len(found) == 1, [_title(each) for each in found or self.processes()]
        return found[0]

    def serves(self) -> bool:
        """A request sent now is answered."""
        body = {"model": "mocked", "prompt": "Hello", "max_tokens": 3}
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.post(f"http://{HOST}:{self.port}/v1/completions", json=body, timeout=5)
            return answer.status_code == 200
        return False


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("orphans"))
    yield commands
    commands.run("stop")
    left = commands.left_running()
    commands.end_all()
    assert left == []


_running = pytest.StashKey[BackgroundCluster]()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, commands: Commands, model_path: Path) -> BackgroundCluster:
    """The one before if it has recovered, else a new one."""
    stash = request.config.stash
    if _running not in stash or not stash[_running].serves():
        commands.run("stop")
        stash[_running] = BackgroundCluster(commands, model_path)
    return stash[_running]


@pytest.mark.parametrize(
    "victim",
    [
        ("ray::ServeReplica", "Worker-mock"),
        ("ray::ServeReplica", "Router"),
        ("ray::ServeReplica", "Registry"),
        ("ray::ServeController",),
        ("ray::HAProxyManager",),
        ("/haproxy", "-db"),
    ],
    ids=lambda words: "-".join(words).replace("ray::", "").replace("/", ""),
)
def test_who_can_be_replaced_leaves_nothing_and_is_replaced(
    cluster: BackgroundCluster, victim: tuple[str, ...]
) -> None:
    process = next(each for each in cluster.processes() if all(word in _title(each) for word in victim))
    below = [process, *process.children(recursive=True)]
    process.kill()
    gone_s = _until(lambda: not _alive(below), GONE_WITHIN_S)
    served_s = gone_s + _until(cluster.serves, BACK_WITHIN_S)
    again_s = served_s + _until(lambda: bool(_titled(cluster, victim)), BACK_WITHIN_S)
    print(
        f"{victim}: {len(below)} gone in {gone_s:.1f} s, served at {served_s:.1f}, again at {again_s:.1f} s"
    )
    assert _until(lambda: not _strays(cluster), GONE_WITHIN_S) < GONE_WITHIN_S


@pytest.mark.parametrize("victim", ["raylet", "gcs_server", "baton serve"])
def test_without_its_head_the_whole_cluster_ends(
    cluster: BackgroundCluster, commands: Commands, victim: str
) -> None:
    words = ("deploy.cli", "serve") if victim == "baton serve" else (f"/{victim}",)
    cluster.find(*words).kill()
    began_s = time.monotonic()
    assert commands.left_running(grace_s=ENDED_WITHIN_S) == []
    print(f"{victim}: everything gone in {time.monotonic() - began_s:.1f} s")
    status = commands.run("status", cluster.port)
    assert status.returncode == 1


def _titled(cluster: BackgroundCluster, words: tuple[str, ...]) -> list[psutil.Process]:
    return [each for each in cluster.processes() if all(word in _title(each) for word in words)]


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _strays(cluster: BackgroundCluster) -> list[str]:
    """Processes of the cluster whose parent is none of it; the one that was started first may be one."""
    processes = cluster.processes()
    pids = {process.pid for process in processes}
    strays = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.ppid() not in pids and "deploy.cli" not in _title(process):
                strays.append(_title(process))
    return strays


def _until(condition: Callable[[], bool], limit_s: float) -> float:
    """Seconds until it holds.

    Raises:
        AssertionError: not within the limit.
    """
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < limit_s, "not in time"
        time.sleep(0.1)
    return time.monotonic() - began_s
