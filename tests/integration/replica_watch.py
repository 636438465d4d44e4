"""Serve's replicas of each worker deployment, by state, as they come and go."""

from __future__ import annotations

import json
import threading
import time

REPLICAS = "replicas: "
_POLL_S = 0.1


def watch_replicas() -> None:
    """Prints a line whenever what Serve says has changed, as long as the process lives."""
    threading.Thread(target=_watch, name="replica watch", daemon=True).start()


def _watch() -> None:
    from ray import serve

    from deploy.settings import APP_NAME

    last = ""
    while True:
        deployments = serve.status().applications[APP_NAME].deployments
        states = {
            name: {
                str(getattr(state, "value", state)): num for state, num in deployment.replica_states.items()
            }
            for name, deployment in deployments.items()
            if name.startswith("Worker")
        }
        if (line := REPLICAS + json.dumps(states)) != last:
            print(last := line, flush=True)
        time.sleep(_POLL_S)
