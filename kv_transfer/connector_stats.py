"""What the worker processes of an engine tell its scheduler beside NIXL's own counters."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

from kv_transfer.params import NUM_PINNED_STAT, STEPS_STAT

PULLS_STAT = "baton_pulls"
"""Rows of request id, outcome, reason, bytes and seconds, one a finished pull."""
STALLED_READS_STAT = "baton_stalled_reads"
"""Ids of requests whose read goes on without them."""
ENDED_READS_STAT = "baton_ended_reads"
"""Ids of those whose read then ended."""
_STATS = (PULLS_STAT, STALLED_READS_STAT, ENDED_READS_STAT, NUM_PINNED_STAT, STEPS_STAT)


class BatonConnectorStats(NixlKVConnectorStats):
    """NIXL's counters plus one row a finished pull, on their way from workers to the scheduler.

    So are the ids of requests whose read goes on without them, and of those whose read then ended. The
    scheduler adds the steps that were measured.
    """

    def reset(self) -> None:
        super().reset()
        self.data.update({stat: [] for stat in _STATS})

    def is_empty(self) -> bool:
        return super().is_empty() and not any(self.data[stat] for stat in _STATS)
