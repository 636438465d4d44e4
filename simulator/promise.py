"""A decode worker's promise of KV room for a request that is still being prefilled elsewhere."""

from __future__ import annotations

from core.errors import RequestRefused
from core.types import WorkerLoad
from simulator.worker import SimulatedWorker


class Promise:
    """Asked for once; given or refused by one worker, and lost with it."""

    __slots__ = ("_given", "_request_id", "_worker")

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._worker: SimulatedWorker | None = None
        self._given = False

    def ask(self, worker: SimulatedWorker | None, num_tokens: int) -> WorkerLoad | None:
        """Asks a living worker, unless one was asked before; returns the load that its answer carries."""
        if worker is None or self._worker is not None:
            return None
        load = worker.load()
        self._worker = worker
        try:
            worker.check()
            used_tokens = load.kv_used_blocks * worker.group.worker.block_size_tokens
            worker.reservations.reserve(self._request_id, num_tokens, used_tokens)
            self._given = True
        except RequestRefused:
            pass
        return load

    def given_by(self, worker: SimulatedWorker | None) -> bool:
        """Whether this start of the worker has promised room."""
        return self._given and self._worker is worker

    def end(self) -> None:
        """The promise is used up or given back."""
        if self._worker is not None:
            self._worker.reservations.release(self._request_id)
            self._worker = None
            self._given = False
