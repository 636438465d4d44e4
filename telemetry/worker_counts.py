"""Workers of a snapshot counted into a gauge."""

from __future__ import annotations

from collections import Counter
from itertools import product

from prometheus_client import Gauge

from core.types import Role, Snapshot, WorkerReport

STATES = ("active", "draining", "quarantined")


class WorkerCounts:
    """Sets a gauge labelled model, role, state to the workers of a snapshot.

    Every role and state of a model once seen stays exposed, as zero when empty: a pool that lost its
    last worker must read 0, not vanish.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._models: set[str] = set()

    def set(self, snapshot: Snapshot) -> None:
        """Makes the gauge show this snapshot."""
        counts = Counter((worker.model, worker.role, _state(worker)) for worker in snapshot.workers)
        self._models.update(worker.model for worker in snapshot.workers)
        for key in product(self._models, Role, STATES):
            self._gauge.labels(*key).set(counts[key])


def _state(worker: WorkerReport) -> str:
    if worker.trouble:
        return "quarantined"
    return "draining" if worker.draining else "active"
