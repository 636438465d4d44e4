"""A simulated request on one worker: what the worker tells of it, passed on to the request's lap."""

from __future__ import annotations

from typing import Protocol

from core.types import WorkerLoad
from core.worker_events import Finished, KvPull, Prefilled
from simulator.event_queue import EventQueue
from simulator.router import SimulatedRouter
from simulator.worker import SimulatedWorker


class PinnedKv:
    """A prompt's KV where it was computed, until it is pulled, released or its lease ends."""

    __slots__ = ("_request_id", "worker")

    def __init__(self, worker: SimulatedWorker, request_id: str) -> None:
        self.worker = worker
        self._request_id = request_id

    def keep(self) -> None:
        """A decode worker renews the lease from now on."""
        self.worker.kept_pins.add(self._request_id)

    def stop_keeping(self) -> None:
        """Nobody renews the lease any more."""
        self.worker.kept_pins.discard(self._request_id)

    def release(self) -> None:
        """The KV is not needed any more."""
        self.stop_keeping()
        if not self.worker.dead:
            self.worker.release(self._request_id)


class Lap(Protocol):
    """The request that runs its legs: what it is told of them, directly or once an answer has travelled."""

    @property
    def rpc_s(self) -> float:
        """One way between router and worker."""

    @property
    def queue(self) -> EventQueue: ...

    def prefill_done(
        self, now_s: float, worker: SimulatedWorker, attempt: int, prefilled: Prefilled, load: WorkerLoad
    ) -> None: ...

    def prefill_failed(self, now_s: float, worker_id: str, attempt: int) -> None: ...

    def pull(self, leg: DecodeLeg, now_s: float, pull: KvPull) -> None: ...

    def decode_prefilled(self, now_s: float, prefilled: Prefilled, last_token_s: float | None) -> None: ...

    def decode_done(self, now_s: float) -> None: ...

    def decode_failed(self, now_s: float, worker_id: str, attempt: int, num_tokens: int = 0) -> None: ...

    def decode_stalled(self, now_s: float, leg: DecodeLeg, worker: SimulatedWorker) -> None: ...


class PrefillLeg:
    """A request on its prefill worker."""

    __slots__ = ("_attempt", "_lap", "_prefilled", "_worker_id")

    def __init__(self, lap: Lap, worker_id: str, attempt: int) -> None:
        self._lap = lap
        self._worker_id = worker_id
        self._attempt = attempt
        self._prefilled: Prefilled | None = None

    def on_pull(self, now_s: float, pull: KvPull) -> None:
        raise AssertionError("a prefill leg has nothing to pull")

    def on_unneeded_pull(self, now_s: float) -> None:
        raise AssertionError("a prefill leg has nothing to pull")

    def on_prefilled(self, now_s: float, prefilled: Prefilled) -> None:
        self._prefilled = prefilled

    def on_preempted(self, last_token_s: float) -> None:
        """It starts over; nothing was emitted."""

    def on_finished(self, now_s: float, worker: SimulatedWorker, finished: Finished) -> None:
        lap = self._lap
        answer = worker, self._attempt, self._prefilled, worker.load()
        lap.queue.at(now_s + lap.rpc_s, lap.prefill_done, *answer)

    def on_lost(self, now_s: float) -> None:
        lap = self._lap
        lap.queue.at(now_s + lap.rpc_s, lap.prefill_failed, self._worker_id, self._attempt)

    def on_silent(self, now_s: float, worker: SimulatedWorker) -> None:
        """The prefill timeout takes care of it."""


class DecodeLeg:
    """A request on its decode worker."""

    __slots__ = (
        "_decodes_since",
        "_lap",
        "_last_token_s",
        "_num_tokens",
        "_pulling",
        "_router",
        "_worker",
        "attempt",
        "source",
        "worker_id",
    )

    def __init__(
        self, lap: Lap, router: SimulatedRouter, worker_id: str, attempt: int, source: PinnedKv | None
    ) -> None:
        self._lap = lap
        self.attempt = attempt
        self.worker_id = worker_id
        self.source = source
        self._router = router
        self._worker: SimulatedWorker | None = None
        self._pulling = False
        self._num_tokens = 0
        """Without those it has decoded since it joined the batch."""
        self._decodes_since: int | None = None
        """Steps its worker had done when it joined the batch; None while it is not in it."""
        self._last_token_s: float | None = None
        """Set from a preemption to the next token."""

    def watch(self, worker: SimulatedWorker) -> None:
        """Tokens begin to flow, and with them the worker's load."""
        self._worker = worker
        worker.watchers[self._router] += 1

    def stop_watching(self, worker: SimulatedWorker) -> None:
        worker.watchers[self._router] -= 1
        if not worker.watchers[self._router]:
            del worker.watchers[self._router]

    def on_pull(self, now_s: float, pull: KvPull) -> None:
        self._pulling = True
        self._lap.pull(self, now_s, pull)

    def on_unneeded_pull(self, now_s: float) -> None:
        assert self.source is not None
        self.source.release()

    def on_prefilled(self, now_s: float, prefilled: Prefilled) -> None:
        self._lap.decode_prefilled(now_s, prefilled, self._last_token_s)
        self._last_token_s = None
        assert self._worker is not None
        self._num_tokens += 1
        self._decodes_since = self._worker.num_steps

    def on_preempted(self, last_token_s: float) -> None:
        self._leave_batch()
        if self._last_token_s is None:  # else it was preempted before and got no token since
            self._last_token_s = last_token_s

    def on_finished(self, now_s: float, worker: SimulatedWorker, finished: Finished) -> None:
        self.stop_watching(worker)
        self._lap.decode_done(now_s)

    def on_lost(self, now_s: float) -> None:
        if self.source is not None:
            self.source.stop_keeping()
        lap = self._lap
        lap.queue.at(now_s + lap.rpc_s, lap.decode_failed, self.worker_id, self.attempt, self.num_tokens())

    def on_silent(self, now_s: float, worker: SimulatedWorker) -> None:
        self._lap.decode_stalled(now_s, self, worker)

    def num_tokens(self) -> int:
        """Tokens it has given so far."""
        self._leave_batch()
        return self._num_tokens

    def num_tokens_at(self, now_s: float) -> int:
        """The same at this moment, also between the decode steps in flight."""
        if self._decodes_since is None:
            return self._num_tokens
        assert self._worker is not None
        return self._num_tokens + self._worker.num_steps_at(now_s) - self._decodes_since

    def _leave_batch(self) -> None:
        if self._decodes_since is not None:
            assert self._worker is not None
            self._num_tokens += self._worker.num_steps - self._decodes_since
            self._decodes_since = None

    def give_up(self, worker: SimulatedWorker) -> None:
        """The router has dropped it; a pull under way frees its source when it ends."""
        self.stop_watching(worker)
        if self.source is not None and not self._pulling:
            self.source.release()
