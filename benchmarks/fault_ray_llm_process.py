"""Ray Serve LLM with separate prefill and decode, in a Ray of its own; the end of standard input ends it.

Each line of standard input is answered by a line with the replicas of every deployment.

    python -m benchmarks.fault_ray_llm_process ARGUMENTS

The arguments are JSON: ``pd`` is what ``build_pd_openai_app`` takes, ``host`` and ``port`` are where it
serves, ``metrics_port`` is Ray's own.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

READY, REPLICAS = "ready", "replicas: "


def main() -> None:
    import ray
    from ray import serve
    from ray.serve.llm import build_pd_openai_app

    arguments = json.loads(sys.argv[1])
    ray.init(
        num_cpus=16,
        include_dashboard=False,
        _node_ip_address=arguments["host"],
        _metrics_export_port=arguments["metrics_port"],
        object_store_memory=256 << 20,
    )
    try:
        serve.start(http_options={"host": arguments["host"], "port": arguments["port"]})
        serve.run(build_pd_openai_app(arguments["pd"]), name="llm", blocking=False)
        print(READY, flush=True)
        for _ in sys.stdin:
            print(f"{REPLICAS}{json.dumps(_replicas())}", flush=True)
        serve.shutdown()
    finally:
        ray.shutdown()


def _replicas() -> list[dict[str, Any]]:
    """What Serve's REST API tells of them; there is no dashboard here to ask. None while nobody answers."""
    from ray.serve.context import _get_global_client

    try:
        deployments = _get_global_client().get_serve_details()["applications"]["llm"]["deployments"]
    except Exception:
        traceback.print_exc()
        return []
    return [
        {"deployment": name, **{key: replica.get(key) for key in ("replica_id", "pid", "state")}}
        for name, deployment in deployments.items()
        for replica in deployment["replicas"]
    ]


if __name__ == "__main__":
    main()
