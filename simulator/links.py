"""KV transfers between simulated workers, which share each worker's way in and out."""

from __future__ import annotations

from core.performance_model import KvLink


class WorkerLink:
    """One worker's network interface: full duplex, transfers one after another each way.

    Transfers that share an interface finish on average as fast one after another as side by side, and
    in total no later; one after another costs one event each.
    """

    __slots__ = ("free_in_s", "free_out_s", "link", "slowdown")

    def __init__(self, link: KvLink) -> None:
        self.link = link
        self.slowdown = 1.0
        """Transfers take this many times as long."""
        self.free_in_s = 0.0
        self.free_out_s = 0.0


def transfer(now_s: float, source: WorkerLink, target: WorkerLink, num_bytes: int) -> float:
    """Books a transfer that is ready now; returns when it ends.

    Each of the two interfaces carries what it has in order, whatever the other one of a transfer is busy
    with: were both held until both are free, one busy interface would leave many others idle.
    """
    seconds = num_bytes / min(
        source.link.bytes_per_s / source.slowdown,
        target.link.bytes_per_s / target.slowdown,
    )
    source.free_out_s = max(now_s, source.free_out_s) + seconds
    target.free_in_s = max(now_s, target.free_in_s) + seconds
    return max(source.free_out_s, target.free_in_s) + max(source.link.latency_s, target.link.latency_s)
