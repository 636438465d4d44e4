"""The address under which a replica's own ports are reachable."""

from __future__ import annotations

import ray


def node_host(bind_host: str | None) -> str:
    """``bind_host`` if the cluster keeps to one address, else the node's own in the Ray cluster."""
    return bind_host or ray.util.get_node_ip_address()
