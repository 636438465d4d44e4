"""A cluster on nodes of its own: a head, which has no room for workers, and nodes for them."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.faults.cluster import FaultCluster
from tests.faults.configuration import MODEL, START_TIMEOUT_S, configuration
from tests.faults.ray_nodes import RayNode, RayNodes, ray_nodes
from tests.integration.server_process import ServerProcess

PORT = 8000
GCS_TIMEOUT_S = 20
"""How long raylets wait for a GCS that is gone; Ray's own default is a minute."""
_RAY_ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(GCS_TIMEOUT_S)}


class NodeCluster(FaultCluster):
    """A cluster on nodes of its own."""

    nodes: RayNodes
    initial: dict[str, int]
    """Workers by role."""

    def node_of(self, worker: dict[str, Any]) -> RayNode:
        host = worker["address"].rpartition(":")[0]
        return next(node for node in self.nodes.all if node.host == host)

    def ready(self) -> list[dict[str, Any]]:
        with contextlib.suppress(httpx.HTTPError):
            return [worker for worker in self.workers() if worker["state"] == "ready"]
        return []

    def wait_pool(self, within_s: float, without: set[str] = frozenset()) -> float:
        """Until the pool is complete, none of these workers in it; returns the seconds it took."""
        since_s = time.monotonic()
        while True:
            ready = self.ready()
            complete = Counter(worker["role"] for worker in ready) == self.initial
            if complete and not without & {worker["worker_id"] for worker in ready}:
                return time.monotonic() - since_s
            assert time.monotonic() < since_s + within_s, f"not within {within_s:g} s: {ready}"
            time.sleep(0.2)

    def give_decode_to(self, node: RayNode) -> None:
        """Switches roles until the node has a decode worker."""
        workers = self.ready()
        mine = [worker for worker in workers if self.node_of(worker) is node]
        if any(worker["role"] == "decode" for worker in mine):
            return
        others = [w for w in workers if w["role"] == "decode" and self.node_of(w) is not node]
        self.assign({mine[0]["worker_id"]: "decode", others[0]["worker_id"]: "prefill"})
        self.wait_pool(20)


@contextlib.contextmanager
def node_cluster(
    model: Path, run_dir: Path, environment: dict[str, str], *, num_nodes: int, initial: dict[str, int]
) -> Iterator[NodeCluster]:
    config = configuration(model, PORT)
    config["router"] |= {"host": "0.0.0.0", "replicas": 1}
    config["models"][0]["shapes"][0] |= {"count": sum(initial.values()), "initial": initial}
    with ray_nodes(config, _RAY_ENVIRONMENT | environment, num_nodes=num_nodes) as nodes:
        config["ray"] = {"address": nodes.address}
        path = run_dir / "cluster.yaml"
        path.write_text(json.dumps(config))
        process = ServerProcess(
            "the cluster",
            nodes.head.command(sys.executable, "-m", "tests.faults.cluster_process", str(path)),
            nodes.head.environment,
            run_dir / "cluster.log",
        )
        try:
            cluster = NodeCluster(f"http://{nodes.head.host}:{PORT}", MODEL, pid=process.pid)
            cluster.process, cluster.nodes, cluster.initial = process, nodes, initial
            with contextlib.closing(cluster):
                cluster.answer(START_TIMEOUT_S)
                cluster.wait_pool(30)
                yield cluster
        finally:
            process.stop(grace_s=1)  # its nodes go with everything that runs on them
