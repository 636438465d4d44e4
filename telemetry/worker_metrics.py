"""What a worker measures: its role, load, KV use and the work of both legs.

Labelled model, shape and worker. Adapter and tenant are left to the routers, which count the same
requests: workers come and go, and their number times that of tenants would be too many series.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from core.types import Role, WorkerLoad
from telemetry.catalog import LATENCY_BUCKETS_S, Catalog
from telemetry.label_limit import LabelLimit

WORKER = ("model", "shape", "worker")


class WorkerMetrics:
    """The metrics of one worker. All methods are called from its event loop.

    Args:
        registry: where the metrics are exposed.
        model: the model's name.
        shape: the shape's name.
        worker_id: this worker.
    """

    def __init__(self, registry: CollectorRegistry, *, model: str, shape: str, worker_id: str) -> None:
        self.catalog = catalog = Catalog(registry)
        self._me = me = (model, shape, worker_id)
        self._limit_reason = LabelLimit(32)

        self._role = catalog.gauge(
            "baton_worker_role",
            "0 or 1",
            "1 for the role (prefill, decode) the worker has now.",
            (*WORKER, "role"),
        )
        self._draining = catalog.gauge(
            "baton_worker_draining", "0 or 1", "1 while the worker drains.", WORKER
        ).labels(*me)
        self._startup = catalog.gauge(
            "baton_worker_startup_seconds", "seconds", "Time the start took, by phase.", (*WORKER, "phase")
        )
        self._kv_capacity = catalog.gauge(
            "baton_worker_kv_capacity_blocks", "blocks", "KV blocks the engine has.", WORKER
        ).labels(*me)
        self._kv_used = catalog.gauge(
            "baton_worker_kv_used_blocks",
            "blocks",
            "KV blocks held by requests that run, wait for a pull or are pinned for one.",
            WORKER,
        ).labels(*me)
        self._running = catalog.gauge(
            "baton_worker_running_requests", "requests", "Requests in the running batch.", WORKER
        ).labels(*me)
        self._waiting = catalog.gauge(
            "baton_worker_waiting_requests", "requests", "Requests queued for the batch.", WORKER
        ).labels(*me)
        self._waiting_tokens = catalog.gauge(
            "baton_worker_waiting_prefill_tokens",
            "tokens",
            "Prompt tokens of requests without a first token.",
            WORKER,
        ).labels(*me)
        self._pinned = catalog.gauge(
            "baton_worker_pinned_prompts", "prompts", "Prefilled prompts whose KV waits to be pulled.", WORKER
        ).labels(*me)

        self._requests = catalog.counter(
            "baton_worker_requests_total",
            "requests",
            "Requests the worker took, by leg (prefill, decode) and outcome.",
            (*WORKER, "leg", "outcome"),
        )
        self._refused = catalog.counter(
            "baton_worker_refused_requests_total",
            "requests",
            "Requests refused before any work, by leg and reason.",
            (*WORKER, "leg", "reason"),
        )
        self._queue = catalog.histogram(
            "baton_worker_queue_seconds",
            "Arrival at the engine to first scheduling.",
            WORKER,
            buckets=LATENCY_BUCKETS_S,
        ).labels(*me)
        self._prefill = catalog.histogram(
            "baton_worker_prefill_seconds",
            "First scheduling to first token, of prompts computed here.",
            WORKER,
            buckets=LATENCY_BUCKETS_S,
        ).labels(*me)
        self._prompt_tokens = catalog.counter(
            "baton_worker_prompt_tokens_total", "tokens", "Prompt tokens of prompts computed here.", WORKER
        ).labels(*me)
        self._cached_prompt_tokens = catalog.counter(
            "baton_worker_cached_prompt_tokens_total",
            "tokens",
            "Of those, tokens found in the prefix cache.",
            WORKER,
        ).labels(*me)
        self._output_tokens = catalog.hot_counter(
            "baton_worker_output_tokens_total", "tokens", "Tokens the engine sampled.", WORKER
        ).labels(*me)

        self._kv_handles = catalog.counter(
            "baton_worker_kv_handles_total",
            "handles",
            "KV handles received, by outcome (pulled, cached, recomputed).",
            (*WORKER, "outcome"),
        )
        self._kv_recomputes = catalog.counter(
            "baton_worker_kv_recomputes_total",
            "recomputes",
            "Prompts recomputed although a KV handle came, by reason.",
            (*WORKER, "reason"),
        )
        self._kv_pull = catalog.histogram(
            "baton_worker_kv_pull_seconds",
            "First read posted to last read complete.",
            WORKER,
            buckets=LATENCY_BUCKETS_S,
        ).labels(*me)
        self._kv_pulled_bytes = catalog.counter(
            "baton_worker_kv_pulled_bytes_total", "bytes", "KV this worker pulled from others.", WORKER
        ).labels(*me)
        self._leases_expired = catalog.counter(
            "baton_worker_leases_expired_total",
            "leases",
            "Leases of pinned KV that ended before a pull or a release.",
            WORKER,
        ).labels(*me)

    def set_role(self, role: Role) -> None:
        """The worker has this role from now on."""
        for each in Role:
            self._role.labels(*self._me, each).set(each is role)

    def set_draining(self, draining: bool) -> None:
        """Whether the worker drains."""
        self._draining.set(draining)

    def set_startup(self, startup_s: Mapping[str, float]) -> None:
        """How long each phase of the start took, in seconds."""
        for phase, seconds in startup_s.items():
            self._startup.labels(*self._me, phase).set(seconds)

    def set_capacity(self, num_kv_blocks: int) -> None:
        """The engine's KV blocks, known once it has started."""
        self._kv_capacity.set(num_kv_blocks)

    def set_load(self, load: WorkerLoad) -> None:
        """The engine's load; call with every heartbeat."""
        self._kv_used.set(load.kv_used_blocks)
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        self._waiting_tokens.set(load.waiting_prefill_tokens)
        self._pinned.set(load.num_pinned)

    def prompt_computed(
        self, *, queue_s: float, prefill_s: float, num_tokens: int, num_cached_tokens: int
    ) -> None:
        """A prompt prefilled on this worker, in either leg, has its first token."""
        self._queue.observe(queue_s)
        self._prefill.observe(prefill_s)
        self._prompt_tokens.inc(num_tokens)
        self._cached_prompt_tokens.inc(num_cached_tokens)

    def tokens_sampled(self, num_tokens: int) -> None:
        """The engine produced tokens; cheap enough for every delta."""
        self._output_tokens.value += num_tokens

    def finished(self, leg: Role, outcome: str) -> None:
        """A request of this leg ended: ``stop``, ``length``, ``abort`` or ``error``."""
        self._requests.labels(*self._me, leg, outcome).inc()

    def refused(self, leg: Role, reason: str) -> None:
        """A request was refused before any work: ``draining`` or ``overloaded``."""
        self._refused.labels(*self._me, leg, self._limit_reason(reason)).inc()

    def kv_pulled(self, num_bytes: int, pull_s: float) -> None:
        """A KV handle was pulled."""
        self._kv_handles.labels(*self._me, "pulled").inc()
        self._kv_pulled_bytes.inc(num_bytes)
        self._kv_pull.observe(pull_s)

    def kv_cached(self) -> None:
        """A KV handle was not needed: the prefix cache held all its blocks."""
        self._kv_handles.labels(*self._me, "cached").inc()

    def kv_recomputed(self, reason: str) -> None:
        """A KV handle did not fit, its lease was over or its pull failed."""
        self._kv_handles.labels(*self._me, "recomputed").inc()
        self._kv_recomputes.labels(*self._me, self._limit_reason(reason)).inc()

    def leases_expired(self, num_leases: int = 1) -> None:
        """Leases of KV pinned here ended unused."""
        self._leases_expired.inc(num_leases)
