"""One simulated request's way through prefill, handoff and decode: ``router/relay.py`` as events."""

from __future__ import annotations

from typing import Protocol

from core.errors import NoWorkerAvailable, Rejected, RequestRefused, WorkerLost
from core.request import Path
from core.types import WorkerLoad
from core.worker_events import KvPull, Prefilled, SequenceSpec
from router.disaggregation import SamplingFacts, choose_path
from router.routing import Decision
from simulator.answer import Answer
from simulator.event_queue import EventQueue
from simulator.gate import Gate
from simulator.legs import DecodeLeg, PinnedKv, PrefillLeg
from simulator.placing import Placing
from simulator.promise import Promise
from simulator.pulls import KvPulls
from simulator.recorder import Recorder
from simulator.router import SimulatedRouter
from simulator.spec import ClusterSpec
from simulator.traces.trace import TraceRequest
from simulator.worker import SimulatedWorker

_MAX_ATTEMPTS = 3


class Cluster(Protocol):
    """What a request meets."""

    queue: EventQueue
    recorder: Recorder
    pulls: KvPulls
    spec: ClusterSpec

    def worker(self, worker_id: str) -> SimulatedWorker | None:
        """The worker, if it lives."""


class Lap:
    """One request under way."""

    __slots__ = (
        "_answer",
        "_attempt",
        "_cluster",
        "_decode_id",
        "_index",
        "_path",
        "_placing",
        "_prefilled",
        "_promise",
        "_request",
        "_router",
        "_source",
        "_started",
        "_tried",
    )

    def __init__(self, cluster: Cluster, router: SimulatedRouter, index: int, request: TraceRequest) -> None:
        self._cluster = cluster
        self._router = router
        self._index = index
        self._request = request
        self._path = choose_path(SamplingFacts(max_tokens=request.output_tokens))
        self._tried: list[str] = []
        self._attempt = 0
        """Legs begun: an answer of an earlier one is ignored."""
        self._decode_id = ""
        self._placing = Placing(self, router, cluster.spec, index, request, self._path)
        self._answer = Answer(cluster.recorder, router, index, request, self._placing)
        self._promise = Promise(str(index))
        self._source: PinnedKv | None = None
        self._prefilled: Prefilled | None = None
        self._started = False
        """The decode leg has given a token."""

    def arrive(self, now_s: float) -> None:
        """The request reaches its router."""
        limit = self._cluster.spec.max_ongoing_requests
        self._answer.arrived()
        if 0 < limit < self._router.num_ongoing:
            self._answer.refused()
            self._give_up(now_s)
        else:
            self.queue.at(now_s + self._cluster.spec.router_s, self._start)

    def _start(self, now_s: float) -> None:
        """The router has tokenized it."""
        if self._router.gate is not None:
            self._queue_up(self._router.gate)
        elif self._path is Path.PREFILL_ONLY:
            self._prefill_only(now_s)
        else:
            self._prefill_remotely(now_s)

    def _queue_up(self, gate: Gate) -> None:
        try:
            placement = gate.offer(self._placing)
        except (NoWorkerAvailable, Rejected) as error:
            self.refused(error)
            return
        if placement is not None:
            self._placing.send(placement)

    def sent(self, decision: Decision) -> None:
        """Admission control has let it through."""
        now_s = self.queue.now_s
        if self._path is Path.PREFILL_ONLY:
            assert decision.prefill_worker is not None
            self._send_prefill(now_s, decision.prefill_worker, keep_kv=False)
        else:
            self._prefill_as_decided(now_s, decision)

    def refused(self, error: NoWorkerAvailable | Rejected) -> None:
        """Admission control has turned it away."""
        if isinstance(error, Rejected):
            self._answer.refused(error.reason)
            self._give_up(self.queue.now_s)
        else:
            self._fail(self.queue.now_s)

    # Prefill.

    def _prefill_only(self, now_s: float) -> None:
        try:
            worker_id = self._router.choose_prefill_only(self._placing.routing(now_s), self._tried)
        except NoWorkerAvailable:
            self._fail(now_s)
            return
        self._send_prefill(now_s, worker_id, keep_kv=False)

    def _prefill_remotely(self, now_s: float) -> None:
        if len(self._tried) >= _MAX_ATTEMPTS:
            self._decode_locally(now_s)
            return
        try:
            decision = self._router.choose(self._placing.routing(now_s), self._tried)
        except NoWorkerAvailable:
            self._fail(now_s)
            return
        self._prefill_as_decided(now_s, decision)

    def _prefill_as_decided(self, now_s: float, decision: Decision) -> None:
        self._decode_id = decision.decode_worker
        if decision.prefill_worker is None:
            self._decode_locally(now_s)
            return
        self._placing.expect_decode(now_s, self._decode_id, decision.ttft_s)
        decode_worker = self._cluster.worker(self._decode_id)
        if (load := self._promise.ask(decode_worker, self._request.prompt_tokens + 1)) is not None:
            self._router.on_load(self._decode_id, load)
        self._send_prefill(now_s, decision.prefill_worker, keep_kv=True)

    def _send_prefill(self, now_s: float, worker_id: str, *, keep_kv: bool) -> None:
        self._attempt += 1
        cached_tokens = self._placing.cached_tokens.get(worker_id, 0)
        self._answer.placed(cached_tokens)
        self._router.prefill_sent(
            worker_id, self._prefill_id(self._attempt), self._request.prompt_tokens, cached_tokens
        )
        self._router.prefix_sent(worker_id, self._request)
        self.queue.at(now_s + self.rpc_s, self._submit_prefill, worker_id, self._attempt, keep_kv)

    def _submit_prefill(self, now_s: float, worker_id: str, attempt: int, keep_kv: bool) -> None:
        request, worker = self._request, self._cluster.worker(worker_id)
        leg = PrefillLeg(self, worker_id, attempt)
        try:
            if worker is None:
                raise WorkerLost(worker_id)
            worker.submit(
                SequenceSpec(
                    request_id=self._prefill_id(attempt),
                    num_prompt_tokens=request.prompt_tokens,
                    max_tokens=1,
                    block_hashes=request.block_hashes,
                    keep_kv=keep_kv,
                ),
                leg,
            )
        except (RequestRefused, WorkerLost):
            self.queue.at(now_s + self.rpc_s, self.prefill_failed, worker_id, attempt)
            return
        except ValueError:  # longer than the worker's whole cache: an error to the client
            self._router.prefill_ended(worker_id, self._prefill_id(attempt))
            self._give_up(now_s)
            return
        self.queue.at(now_s + self._cluster.spec.prefill_timeout_s, self._prefill_late, worker, attempt)

    def _prefill_late(self, now_s: float, worker: SimulatedWorker, attempt: int) -> None:
        if attempt != self._attempt or self._prefilled is not None:
            return
        if not worker.dead:
            worker.abort(self._prefill_id(attempt))
        self.prefill_failed(now_s, worker.worker_id, attempt)

    def prefill_failed(self, now_s: float, worker_id: str, attempt: int) -> None:
        """The worker refused, died or was late: another one, or the decode worker by itself."""
        self._router.prefill_ended(worker_id, self._prefill_id(attempt))
        if attempt != self._attempt:
            return
        self._tried.append(worker_id)
        if self._path is not Path.PREFILL_ONLY:
            self._prefill_remotely(now_s)
        elif len(self._tried) >= _MAX_ATTEMPTS:
            self._fail(now_s)
        else:
            self._prefill_only(now_s)

    def prefill_done(
        self, now_s: float, worker: SimulatedWorker, attempt: int, prefilled: Prefilled, load: WorkerLoad
    ) -> None:
        """The first token, and usually a handle, reached the router."""
        self._router.on_load(worker.worker_id, load)
        self._router.prefill_ended(worker.worker_id, self._prefill_id(attempt))
        source = PinnedKv(worker, self._prefill_id(attempt))
        if attempt != self._attempt:
            source.release()
            return
        self._prefilled = prefilled
        self._answer.prefilled(prefilled)
        if self._path is Path.PREFILL_ONLY:
            self._answer.first_token(now_s)
            self._answer.finished(now_s, self._path)
            return
        self._source = source
        if self._promise.given_by(self._cluster.worker(self._decode_id)):
            self._answer.first_token(now_s)
            self._answer.leg_ended(num_tokens=1)
        else:
            self._path = Path.REMOTE
        self._tried.clear()
        self._send_decode(now_s)

    # Decode.

    def _decode_locally(self, now_s: float) -> None:
        self._path = Path.LOCAL
        self._tried.clear()
        self._send_decode(now_s)

    def _send_decode(self, now_s: float) -> None:
        self._placing.expect_no_decode()
        if self._cluster.worker(self._decode_id) is None or self._decode_id in self._tried:
            try:
                decision = self._router.choose(self._placing.routing(now_s), self._tried)
            except NoWorkerAvailable:
                self._fail(now_s)
                return
            self._decode_id = decision.decode_worker
        prompt_tokens = self._request.prompt_tokens
        cached_tokens = self._placing.cached_tokens.get(self._decode_id, 0)
        self._answer.placed(cached_tokens)
        computed_tokens = prompt_tokens - cached_tokens if self._source is None else 0
        self._router.decode_sent(self._decode_id, prompt_tokens, computed_tokens, cached_tokens)
        self._attempt += 1
        self.queue.at(now_s + self.rpc_s, self._submit_decode, self._attempt)

    def _submit_decode(self, now_s: float, attempt: int) -> None:
        request, worker = self._request, self._cluster.worker(self._decode_id)
        promised = self._promise.given_by(worker)
        self._promise.end()
        emitted = self._answer.num_tokens
        self._drop_useless_source(worker)
        leg = DecodeLeg(self, self._router, self._decode_id, attempt, self._source)
        remote_tokens = 0
        if self._source is not None:
            self._source.keep()
            remote_tokens = request.prompt_tokens
        try:
            if worker is None:
                raise WorkerLost(self._decode_id)
            worker.submit(
                SequenceSpec(
                    request_id=self._decode_leg_id(attempt),
                    num_prompt_tokens=request.prompt_tokens + emitted,
                    max_tokens=request.output_tokens - emitted,
                    block_hashes=request.block_hashes,
                    remote_tokens=remote_tokens,
                ),
                leg,
                promised=promised,
            )
        except (RequestRefused, WorkerLost):
            self._release_source()
            self.queue.at(now_s + self.rpc_s, self.decode_failed, self._decode_id, attempt)
            return
        except ValueError:
            self._release_source()
            self._give_up(now_s)
            return
        leg.watch(worker)
        self._answer.leg = leg
        self._source = None  # a handle is used once
        self.queue.at(now_s + self._cluster.spec.stall_timeout_s, self._decode_late, leg, worker)

    def _drop_useless_source(self, worker: SimulatedWorker | None) -> None:
        """KV of a dead worker cannot be pulled, KV of the decode worker itself need not be."""
        if self._source is not None and (self._source.worker.dead or self._source.worker is worker):
            self._cluster.recorder.num_recomputed += 1
            self._release_source()

    def _decode_late(self, now_s: float, leg: DecodeLeg, worker: SimulatedWorker) -> None:
        if leg.attempt == self._attempt and not self._started and not worker.dead:
            self._give_up_on(now_s, leg, worker)

    def decode_stalled(self, now_s: float, leg: DecodeLeg, worker: SimulatedWorker) -> None:
        """The worker has computed nothing for the stall timeout; a leg without a token has its own."""
        if self._started:
            self._give_up_on(now_s, leg, worker)

    def _give_up_on(self, now_s: float, leg: DecodeLeg, worker: SimulatedWorker) -> None:
        worker.abort(self._decode_leg_id(leg.attempt))
        leg.give_up(worker)
        self.decode_failed(now_s, leg.worker_id, leg.attempt, leg.num_tokens())

    def decode_failed(self, now_s: float, worker_id: str, attempt: int, num_tokens: int = 0) -> None:
        """The worker refused or died: before a token of this leg, another one; after it, an error."""
        if attempt != self._attempt:
            return
        self._answer.leg_ended(num_tokens)
        self._tried.append(worker_id)
        if self._started or len(self._tried) >= _MAX_ATTEMPTS:
            self._fail(now_s)
        else:
            self._send_decode(now_s)

    def decode_prefilled(self, now_s: float, prefilled: Prefilled, last_token_s: float | None) -> None:
        """The decode worker has its first token of the request, or the next one after a preemption."""
        answer, recorder = self._answer, self._cluster.recorder
        if not self._started and self._path is Path.LOCAL:
            answer.prefilled(prefilled)
        started, self._started = self._started, True
        if answer.first_token_s is None:
            answer.first_token(now_s + self.rpc_s)
        elif not started:
            recorder.gap(answer.first_token_s, now_s + self.rpc_s)
        else:
            assert last_token_s is not None, "a second prefill without a preemption"
            recorder.gap(last_token_s, now_s)

    def decode_done(self, now_s: float) -> None:
        self._answer.finished(now_s + self.rpc_s, self._path)

    def pull(self, leg: DecodeLeg, now_s: float, pull: KvPull) -> None:
        """The decode worker's blocks are set aside: the KV begins to move."""
        target = self._cluster.worker(leg.worker_id)
        assert leg.source is not None
        assert target is not None
        self._cluster.pulls.begin(now_s, self._index, pull, leg.source, target)

    # Shared.

    def _prefill_id(self, attempt: int) -> str:
        return f"{self._index}.p{attempt}"

    def _decode_leg_id(self, attempt: int) -> str:
        return f"{self._index}.d{attempt}"

    @property
    def rpc_s(self) -> float:
        """One way between router and worker."""
        return self._cluster.spec.rpc_s

    @property
    def queue(self) -> EventQueue:
        return self._cluster.queue

    def _fail(self, now_s: float) -> None:
        self._answer.failed()
        self._give_up(now_s)

    def _give_up(self, now_s: float) -> None:
        self._attempt += 1
        self._placing.expect_no_decode()
        self._promise.end()
        self._release_source()
        self._answer.given_up(now_s, self._path)

    def _release_source(self) -> None:
        if self._source is not None:
            self._source.release()
        self._source = None
