"""Tables of a cluster: who is in it and how busy they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_ROLE_ORDER = {"prefill": 0, "decode": 1}
_STATE_STYLE = {
    "ready": "green",
    "draining": "yellow",
    "unreachable": "red",
    "failing": "red",
    "quarantined": "red",
}

Worker = Mapping[str, Any]
"""One entry of ``workers`` in a router's /baton/status."""
SuspectNode = Mapping[str, Any]
"""One entry of ``suspect_nodes`` there."""


def pools_table(workers: Sequence[Worker]) -> Table:
    """One line for each pool: how many workers, how loaded."""
    table = Table(title="pools", title_justify="left")
    for heading in ("model", "role"):
        table.add_column(heading)
    for heading in ("workers", "ready", "requests", "waiting prompt tokens", "KV used", "pinned"):
        table.add_column(heading, justify="right")
    for (model, role), members in _pools(workers).items():
        num_ready = sum(worker["state"] == "ready" for worker in members)
        table.add_row(
            model,
            role,
            str(len(members)),
            f"[{'green' if num_ready == len(members) else 'red'}]{num_ready}[/]",
            str(_total(members, "num_requests")),
            str(_total(members, "waiting_prefill_tokens")),
            _share(_total(members, "kv_used_blocks"), _total(members, "num_kv_blocks")),
            str(_total(members, "num_pinned")),
        )
    return table


def workers_table(workers: Sequence[Worker]) -> Table:
    """One line for each worker, pool by pool."""
    table = Table(title="workers", title_justify="left")
    for heading in ("worker", "shape", "role", "state", "address"):
        table.add_column(heading, overflow="fold")
    for heading in ("requests", "KV used", "pinned"):
        table.add_column(heading, justify="right")
    for members in _pools(workers).values():
        for worker in sorted(members, key=lambda worker: worker["worker_id"]):
            table.add_row(
                worker["worker_id"],
                worker["shape"],
                worker["role"],
                f"[{_STATE_STYLE.get(worker['state'], 'red')}]{worker['state']}[/]",
                worker["address"],
                str(worker["num_requests"]),
                _share(worker["kv_used_blocks"], worker["num_kv_blocks"]),
                str(worker["num_pinned"]),
            )
        table.add_section()
    return table


def troubles(workers: Sequence[Worker], suspect_nodes: Sequence[SuspectNode]) -> list[str]:
    """A line for each worker in quarantine and each node on which workers keep dying."""
    lines = [
        f"{worker['worker_id']} is quarantined: {worker['trouble']}"
        for worker in workers
        if worker.get("trouble")
    ]
    return lines + [
        f"workers of shape {node['shape']} keep dying on node {node['node_id'][:12]}: "
        f"{node['num_deaths']} in the last minutes, the last one: {node['last_reason']}"
        for node in suspect_nodes
    ]


def _pools(workers: Sequence[Worker]) -> dict[tuple[str, str], list[Worker]]:
    pools: dict[tuple[str, str], list[Worker]] = {}
    for worker in sorted(workers, key=lambda w: (w["model"], _ROLE_ORDER.get(w["role"], 2))):
        pools.setdefault((worker["model"], worker["role"]), []).append(worker)
    return pools


def _total(workers: Sequence[Worker], key: str) -> int:
    return sum(worker[key] for worker in workers)


def _share(used: int, capacity: int) -> str:
    return f"{100 * used / capacity:.0f}%" if capacity else "-"
