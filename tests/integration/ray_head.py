"""A Ray cluster of one node with a job server, for tests that join one.

    python -m tests.integration.ray_head DASHBOARD_PORT

Runs until its standard input closes; then Ray ends with it.
"""

from __future__ import annotations

import sys

READY = "ray head ready"


def main() -> None:
    import ray

    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        dashboard_port=int(sys.argv[1]),
        logging_level="ERROR",
        log_to_driver=False,
    )
    print(READY, context.address_info["gcs_address"], flush=True)
    sys.stdin.buffer.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
