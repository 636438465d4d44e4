"""A Ray cluster of several nodes on one machine: each has a network namespace, hence an address, of its own.

The nodes are daemons, as ``ray start`` leaves them, so that one process of a node can be killed alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.config import parse_config
from deploy.environment import ray_environment
from tests.faults.processes import titled

_MARK = "BATON_TEST_NODE"
_SUBNET = "10.79.0"
BRIDGE_HOST = f"{_SUBNET}.254"
"""This process, seen from the nodes."""
_GCS_PORT = 6379
_START_TIMEOUT_S = 90.0
_RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class RayNode:
    """One node, whether its processes live or not."""

    name: str
    namespace: str
    host: str
    environment: Mapping[str, str]

    def command(self, *command: str) -> list[str]:
        """The command line that runs ``command`` on the node."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(
            self.command(*command),
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """Every process that was started on the node."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get(_MARK) == self.environment[_MARK]
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Replicas of a deployment on this node."""
        return titled(titled(self.processes(), "ServeReplica"), f":{deployment}")

    def system(self, title: str) -> psutil.Process:
        """One of Ray's own processes: ``raylet`` or ``gcs_server``."""
        executables = [each for each in self.processes() if Path(each.cmdline()[0]).name == title]
        (process,) = executables
        return process


class RayNodes:
    """A head, which has no room for workers, and nodes that join it.

    Args:
        config: of the Baton application they will run.
        environment: of all Ray processes, besides what Baton asks for.
    """

    def __init__(
        self, config: Mapping[str, object], environment: Mapping[str, str], num_nodes: int, num_cpus: int
    ) -> None:
        self._undo = ExitStack()
        self._num_cpus = num_cpus
        self.run_dir = Path(tempfile.mkdtemp(prefix="bn-", dir="/tmp"))
        self._undo.callback(shutil.rmtree, self.run_dir, ignore_errors=True)
        self._token = uuid.uuid4().hex
        self._parsed = parse_config(dict(config))
        self._environment = environment
        self._bridge = f"bn{os.getpid()}"
        _ip("link", "add", self._bridge, "type", "bridge")
        self._undo.callback(_ip, "link", "del", self._bridge)
        _ip("addr", "add", f"{BRIDGE_HOST}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        self.head = self._node("head", 1)
        self.nodes = [self._node(f"node{number}", number + 2) for number in range(num_nodes)]

    @property
    def address(self) -> str:
        return f"{self.head.host}:{_GCS_PORT}"

    @property
    def all(self) -> list[RayNode]:
        return [self.head, *self.nodes]

    def _node(self, name: str, number: int) -> RayNode:
        own_dir = self.run_dir / name
        own_dir.mkdir()
        namespace = f"{self._bridge}-{name}"
        _ip("netns", "add", namespace)
        self._undo.callback(_ip, "netns", "del", namespace)
        device = f"{self._bridge}v{number}"
        _ip("link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", device, "master", self._bridge, "up")
        host = f"{_SUBNET}.{number}"
        _ip("-n", namespace, "addr", "add", f"{host}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        environment = {
            **ray_environment(self._parsed, own_dir),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "HF_HUB_OFFLINE": "1",
            "SPT_NOENV": "1",
            **self._environment,
            _MARK: f"{name} {uuid.uuid4().hex}",
        }
        return RayNode(name, namespace, host, environment)

    def start(self) -> None:
        self.start_head()
        for node in self.nodes:
            options = ("--address", self.address, "--num-cpus", str(self._num_cpus))
            node.run(_RAY, "start", *options, *self._common(node))

    def start_head(self) -> None:
        """Also a second time, when the head has died."""
        options = ("--head", "--port", str(_GCS_PORT), "--num-cpus", "0", "--include-dashboard", "false")
        where = ("--temp-dir", str(self.run_dir / "ray"))
        self.head.run(_RAY, "start", *options, *where, *self._common(self.head))

    def drain(self, node: RayNode, within_s: int) -> None:
        """Announces that a node is about to go, as an autoscaler does before it takes one away."""
        (node_id,) = (
            word.removeprefix("--node_id=")
            for word in node.system("raylet").cmdline()
            if word.startswith("--node_id=")
        )
        options = ("--address", self.address, "--node-id", node_id, "--reason-message", "it is leased out")
        why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(within_s))
        self.head.run(_RAY, "drain-node", *options, *why)

    @staticmethod
    def _common(node: RayNode) -> tuple[str, ...]:
        memory = str(200 << 20)
        return ("--node-ip-address", node.host, "--object-store-memory", memory, "--disable-usage-stats")

    def left_running(self) -> list[psutil.Process]:
        return [process for node in self.all for process in node.processes()]

    def end(self) -> None:
        deadline_s = time.monotonic() + 10
        while (left := self.left_running()) and time.monotonic() < deadline_s:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=2)
        self._undo.close()


@contextmanager
def ray_nodes(
    config: Mapping[str, object],
    environment: Mapping[str, str] | None = None,
    *,
    num_nodes: int = 2,
    num_cpus: int = 1,
) -> Iterator[RayNodes]:
    """Started, and ended with everything that runs on them."""
    nodes = RayNodes(config, environment or {}, num_nodes, num_cpus)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.end()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)
