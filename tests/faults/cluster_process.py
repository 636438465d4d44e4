"""A cluster that does as standard input says; the end of the input ends it.

    python -m tests.faults.cluster_process CONFIG

Each line is one of these, answered by one line on standard output:

    apply CONFIG       another configuration, in place
    roles JSON         worker ids to roles, assigned all at once
    unready            the answer names the deployments with replicas that do not run
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

ANSWER = "answer: "


def unready(deployments: Any) -> str:
    """Deployments with replicas that do not run, or not yet, as Ray Serve says; empty if there are none."""
    states = {
        name: {state: number for state, number in each.replica_states.items() if number}
        for name, each in deployments.items()
    }
    return ", ".join(f"{name}: {each}" for name, each in states.items() if set(each) - {"RUNNING"})


def main() -> None:
    from core.types import Role
    from deploy.cluster import Cluster
    from deploy.config import load_config
    from deploy.settings import APP_NAME, REGISTRY_NAME

    with Cluster(load_config(sys.argv[1]), progress=lambda text: print(text, flush=True)) as cluster:
        from ray import serve  # once it is known whether there is HAProxy

        print(f"{ANSWER}{json.dumps({'mark': cluster.mark, 'logs': str(cluster.log_dir)})}", flush=True)
        for line in sys.stdin:
            answer = ""
            try:
                match line.split(maxsplit=1):
                    case ["unready"]:
                        answer = unready(serve.status().applications[APP_NAME].deployments)
                    case ["apply", path]:
                        cluster.update(load_config(path.strip()))
                    case ["roles", roles]:
                        registry = serve.get_deployment_handle(REGISTRY_NAME, APP_NAME)
                        for worker_id, role in json.loads(roles).items():
                            registry.assign_role.remote(worker_id, Role(role)).result(timeout_s=10)
            except Exception as error:
                traceback.print_exc()
                answer = str(error) or repr(error)
            print(f"{ANSWER}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
