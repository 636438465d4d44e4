"""A cluster in a process of its own, because Ray marks the process that starts it for good.

    python -m tests.integration.cluster_process CONFIG

Runs until its standard input closes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.integration.server_process import ServerProcess

READY = "cluster ready"


def start_cluster(config_path: Path, log: Path) -> ServerProcess:
    command = [sys.executable, "-m", "tests.integration.cluster_process", str(config_path)]
    return ServerProcess("the cluster", command, {"HF_HUB_OFFLINE": "1"}, log)


def main() -> None:
    from deploy.cluster import Cluster
    from deploy.config import load_config

    with Cluster(load_config(sys.argv[1]), progress=lambda text: print(text, flush=True)):
        print(READY, flush=True)
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
