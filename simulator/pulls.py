"""KV pulls under way between simulated workers."""

from __future__ import annotations

from core.worker_events import KvPull
from simulator.event_queue import EventQueue
from simulator.legs import PinnedKv
from simulator.links import transfer
from simulator.recorder import Recorder
from simulator.worker import SimulatedWorker


class KvPulls:
    """Moves KV as links allow, and tells both ends when it has arrived.

    Args:
        handoff_s: from a decode worker's decision to pull to the start of the transfer.
    """

    def __init__(self, queue: EventQueue, recorder: Recorder, handoff_s: float) -> None:
        self._queue = queue
        self._recorder = recorder
        self._handoff_s = handoff_s

    def begin(
        self, now_s: float, index: int, pull: KvPull, source: PinnedKv, target: SimulatedWorker
    ) -> None:
        """The target's blocks are set aside for the request with this index in the trace."""
        num_bytes = pull.num_tokens * target.group.kv_bytes_per_token
        end_s = transfer(now_s + self._handoff_s, source.worker.link, target.link, num_bytes)
        self._recorder.pulled(index, end_s - now_s)
        self._queue.at(end_s, self._end, target, pull.request_id, source)

    def _end(self, now_s: float, target: SimulatedWorker, request_id: str, source: PinnedKv) -> None:
        if target.dead:
            return  # nobody knows how far it read: the lease frees the source
        ok = not source.worker.dead and now_s >= target.failing_pulls_until_s
        self._recorder.num_recomputed += not ok
        target.kv_arrived(request_id, ok=ok)
        source.release()
