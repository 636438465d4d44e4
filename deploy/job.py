"""Entry point of a Ray job: joins the cluster it runs in, serves there until the job is stopped.

    ray job submit -- python -m deploy.job CONFIG

The job log has one line per phase of the start, then the URL. ``ray job stop`` sends SIGTERM: the
application is deleted, its workers finish what they have. Ray kills a job that takes longer than
RAY_JOB_STOP_WAIT_TIME_S (3 s) to end, which cuts the wait short, not the deletion: Serve goes on with it.
"""

from __future__ import annotations

import sys

from deploy.cli_output import phase_lines, report
from deploy.config import load_config
from deploy.config_schema import BatonConfig
from deploy.foreground import running_cluster, wait_for_signal

_USAGE = "usage: python -m deploy.job CONFIG"


def inside_cluster(config: BatonConfig) -> BatonConfig:
    """The configuration as it holds for a job: unless it names a Ray cluster, it is the job's own."""
    if config.ray.address is not None:
        return config
    ray = config.ray.model_copy(update={"address": "auto", "num_cpus": None})
    return config.model_copy(update={"ray": ray})


def main(arguments: list[str]) -> int:
    """Serves until SIGTERM.

    Returns:
        Exit status: 0 stopped, 1 failed, 2 wrong configuration or command line.
    """
    if len(arguments) != 1:
        print(_USAGE, file=sys.stderr)
        return 2
    try:
        config = inside_cluster(load_config(arguments[0]))
        with phase_lines() as progress, running_cluster(config, progress) as cluster:
            print(f"ready: {cluster.url}/v1", flush=True)
            wait_for_signal(cluster)
    except Exception as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
