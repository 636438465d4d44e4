"""A cluster of mock engines whose number of routers follows what standard input says.

    python -m tests.integration.routers_process CONFIG

Each line is a number of router replicas; the end of the input ends the cluster.
"""

from __future__ import annotations

import sys

READY = "cluster ready"


def main() -> None:
    from deploy.cluster import Cluster
    from deploy.config import load_config

    config = load_config(sys.argv[1])
    with Cluster(config, progress=lambda text: print(text, flush=True)) as cluster:
        print(f"{READY} with {config.router.replicas}", flush=True)
        for line in sys.stdin:
            num_routers = int(line)
            changed = config.router.model_copy(update={"replicas": num_routers})
            cluster.update(config.model_copy(update={"router": changed}))
            print(f"{READY} with {num_routers}", flush=True)


if __name__ == "__main__":
    main()
