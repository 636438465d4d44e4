"""A cluster whose workers' roles follow what standard input says.

    python -m tests.integration.planned_process CONFIG

Each line is a JSON mapping of worker ids to roles, assigned all at once; the answer is a line with the moment
they were asked for, on the machine's monotonic clock. The end of the input ends the cluster. All the while
it says what replicas of workers there are.
"""

from __future__ import annotations

import json
import sys
import time

READY = "cluster ready"
ASSIGNED = "assigned at"


def main() -> None:
    from deploy.cluster import Cluster
    from deploy.config import load_config

    with Cluster(load_config(sys.argv[1]), progress=lambda text: print(text, flush=True)):
        from ray import serve

        from core.types import Role
        from deploy.settings import APP_NAME, REGISTRY_NAME
        from tests.integration.replica_watch import watch_replicas

        watch_replicas()
        print(READY, flush=True)
        for line in sys.stdin:
            registry = serve.get_deployment_handle(REGISTRY_NAME, APP_NAME)
            began_s = time.monotonic()
            answers = [
                registry.assign_role.remote(worker_id, Role(role))
                for worker_id, role in json.loads(line).items()
            ]
            for answer in answers:
                answer.result(timeout_s=10)
            print(f"{ASSIGNED} {began_s}", flush=True)


if __name__ == "__main__":
    main()
