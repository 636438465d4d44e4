"""What a router measures: latency, SLO attainment and the waterfall of every request.

Times are as the client sees them at the router: from the request's arrival to the moment a token leaves
for the client. Metrics of requests are labelled model, adapter and tenant; metrics of the cluster model.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from core.clock import Clock, MonotonicClock
from core.request import Leg, Path
from core.types import Snapshot
from telemetry.catalog import (
    LATENCY_BUCKETS_S,
    LEG_BUCKETS_S,
    TOKEN_GAP_BUCKETS_S,
    WHOLE_ANSWER_BUCKETS_S,
    Catalog,
)
from telemetry.label_limit import OTHER, LabelLimit
from telemetry.slo import Outcome, SloResult, SloTargets, judge, time_per_output_token_s
from telemetry.worker_counts import WorkerCounts

WHO = ("model", "adapter", "tenant")
MAX_LABEL_VALUES = 32
MAX_LABEL_SETS = 128


class RouterMetrics:
    """The metrics of one router process. All methods are called from its event loop.

    Args:
        registry: where the metrics are exposed.
        slo_targets: targets by model; requests of other models are not judged.
        clock: for the age of the snapshot.
        max_label_values: distinct adapters, tenants and reasons kept apart; the rest become ``other``.
        max_label_sets: distinct (model, adapter, tenant) kept apart, because limits multiply.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        slo_targets: Mapping[str, SloTargets] | None = None,
        clock: Clock | None = None,
        max_label_values: int = MAX_LABEL_VALUES,
        max_label_sets: int = MAX_LABEL_SETS,
    ) -> None:
        self.catalog = catalog = Catalog(registry)
        self.slo_targets = dict(slo_targets or {})
        self.limit_reason = LabelLimit(max_label_values)
        self._limit_adapter = LabelLimit(max_label_values)
        self._limit_tenant = LabelLimit(max_label_values)
        self._max_label_sets = max_label_sets
        self._by_who: dict[tuple[str, str, str], RequestMetrics] = {}

        self.requests = catalog.counter(
            "baton_requests_total",
            "requests",
            f"Requests that ended, by path ({', '.join(Path)}) and outcome ({', '.join(Outcome)}).",
            (*WHO, "path", "outcome"),
        )
        self.inflight = catalog.gauge(
            "baton_inflight_requests", "requests", "Requests that arrived and have not ended.", WHO
        )
        self.rejected = catalog.counter(
            "baton_rejected_requests_total",
            "requests",
            "Requests that admission control refused before any work was done, by reason.",
            ("reason",),
        )
        self.queued = catalog.gauge(
            "baton_queued_requests", "requests", "Requests that wait in this router for room on the workers."
        )
        self.slo_requests = catalog.counter(
            "baton_slo_requests_total",
            "requests",
            "Offered requests by SLO result (met, missed_ttft, missed_tpot, failed); a request that misses"
            " both targets is missed_ttft. Attainment is met over all, goodput the rate of met.",
            (*WHO, "result"),
        )
        self.ttft = catalog.histogram(
            "baton_ttft_seconds",
            "Arrival to first token, of every request that got one.",
            WHO,
            buckets=LATENCY_BUCKETS_S,
        )
        self.tpot = catalog.histogram(
            "baton_tpot_seconds",
            "Mean time per output token after the first, of whole answers of two tokens or more.",
            WHO,
            buckets=TOKEN_GAP_BUCKETS_S,
        )
        self.itl = catalog.hot_histogram(
            "baton_itl_seconds",
            "Gap between two arrivals of tokens; tokens that arrive together count as one arrival.",
            WHO,
            buckets=TOKEN_GAP_BUCKETS_S,
        )
        self.e2e = catalog.histogram(
            "baton_e2e_seconds",
            "Arrival to last token, of whole answers.",
            WHO,
            buckets=WHOLE_ANSWER_BUCKETS_S,
        )
        self.legs = catalog.histogram(
            "baton_leg_seconds",
            f"A request's waterfall, by leg ({', '.join(Leg)}).",
            (*WHO, "leg"),
            buckets=LEG_BUCKETS_S,
        )
        self.prompt_tokens = catalog.counter(
            "baton_prompt_tokens_total", "tokens", "Prompt tokens of placed requests.", WHO
        )
        self.cached_prompt_tokens = catalog.counter(
            "baton_cached_prompt_tokens_total",
            "tokens",
            "Prompt tokens that a worker's prefix cache held, so that nobody computed them.",
            WHO,
        )
        self.output_tokens = catalog.hot_counter(
            "baton_output_tokens_total", "tokens", "Output tokens sent to clients.", WHO
        )
        self.prefill_fallbacks = catalog.counter(
            "baton_prefill_fallbacks_total",
            "fallbacks",
            "Times a prefill was given to another worker, or done locally, by reason.",
            (*WHO, "reason"),
        )
        self.retries = catalog.counter(
            "baton_retries_total",
            "retries",
            "Times a request lost its worker and went on elsewhere, by how: restarted before its first token,"
            " continued after the tokens sent, replayed through them.",
            (*WHO, "how"),
        )
        self.resume_pause = catalog.histogram(
            "baton_resume_pause_seconds",
            "Between the loss of an answer's worker and the next token.",
            ("model",),
            buckets=LATENCY_BUCKETS_S,
        )
        self.kv_recomputes = catalog.counter(
            "baton_kv_recomputes_total",
            "recomputes",
            "Times a decode worker recomputed a prompt instead of pulling its KV, by reason.",
            (*WHO, "reason"),
        )
        self.kv_transfer_bytes = catalog.counter(
            "baton_kv_transfer_bytes_total", "bytes", "KV pulled from prefill to decode workers.", WHO
        )
        targets = catalog.gauge(
            "baton_slo_target_seconds",
            "seconds",
            "The model's SLO target, by slo (ttft, tpot).",
            ("model", "slo"),
        )
        for model, slo in self.slo_targets.items():
            targets.labels(model, "ttft").set(slo.ttft_s)
            targets.labels(model, "tpot").set(slo.tpot_s)

        self._workers = WorkerCounts(
            catalog.gauge(
                "baton_workers",
                "workers",
                "Workers in this router's snapshot, by role (prefill, decode) and state (active, draining, "
                "quarantined).",
                ("model", "role", "state"),
            )
        )
        clock = clock or MonotonicClock()
        self._clock = clock
        self._snapshot_at_s = clock.now_s()
        snapshot_age = catalog.gauge(
            "baton_snapshot_age_seconds",
            "seconds",
            "Time since this router last received a snapshot of the cluster, or since it started.",
        )
        snapshot_age.set_function(lambda: clock.now_s() - self._snapshot_at_s)

    def for_request(self, model: str, adapter: str = "", tenant: str = "") -> RequestMetrics:
        """The metrics of requests of one model, adapter and tenant; cheap, ask for every request.

        Args:
            model: a configured model's name, never a client's unchecked word.
            adapter: LoRA name; empty for the base model.
            tenant: empty if there are no tenants.
        """
        who = (model, self._limit_adapter(adapter), self._limit_tenant(tenant))
        found = self._by_who.get(who)
        if found is None:
            if len(self._by_who) >= self._max_label_sets:
                who = (model, OTHER, OTHER)
            found = self._by_who.setdefault(who, RequestMetrics(self, who))
        return found

    def snapshot_received(self, snapshot: Snapshot) -> None:
        """Shows the snapshot's workers and restarts its age; call whenever one arrives, changed or not."""
        self._snapshot_at_s = self._clock.now_s()
        self._workers.set(snapshot)


class RequestMetrics:
    """The metrics of all requests of one model, adapter and tenant, with the labels already resolved.

    Shared by those requests, so it keeps nothing of a single one: callers hand in durations in seconds.
    """

    __slots__ = ("_all", "_itl", "_legs", "_output_tokens", "_slo_targets", "_ttft", "_who")

    def __init__(self, router_metrics: RouterMetrics, who: tuple[str, str, str]) -> None:
        self._all = router_metrics
        self._who = who
        self._slo_targets = router_metrics.slo_targets.get(who[0])
        self._ttft = router_metrics.ttft.labels(*who)
        self._itl = router_metrics.itl.labels(*who)
        self._output_tokens = router_metrics.output_tokens.labels(*who)
        self._legs = {leg: router_metrics.legs.labels(*who, leg) for leg in Leg}
        # From zero, so that the first miss is already an increase that rate() sees.
        for result in SloResult:
            router_metrics.slo_requests.labels(*who, result)

    def arrived(self) -> None:
        """A request arrived; ``finished`` must follow on every way out."""
        self._all.inflight.labels(*self._who).inc()

    def prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """A worker took the prompt; ``num_cached_tokens`` of it were in its prefix cache."""
        self._all.prompt_tokens.labels(*self._who).inc(num_tokens)
        self._all.cached_prompt_tokens.labels(*self._who).inc(num_cached_tokens)

    def first_token(self, ttft_s: float, num_tokens: int = 1) -> None:
        """The first token left, ``ttft_s`` after the request's arrival."""
        self._ttft.observe(ttft_s)
        self._output_tokens.value += num_tokens

    def next_tokens(self, gap_s: float, num_tokens: int = 1) -> None:
        """Further tokens left together, ``gap_s`` after the ones before."""
        self._itl.observe(gap_s)
        self._output_tokens.value += num_tokens

    def leg(self, leg: Leg, seconds: float) -> None:
        """One leg of a request is over."""
        self._legs[leg].observe(seconds)

    def prefill_fell_back(self, reason: str) -> None:
        """A prefill was given to another worker or is done locally."""
        self._all.prefill_fallbacks.labels(*self._who, self._all.limit_reason(reason)).inc()

    def retried(self, how: str, pause_s: float | None = None) -> None:
        """A request went on elsewhere.

        Args:
            how: ``restarted``, ``continued`` or ``replayed``.
            pause_s: of an answer that had begun; None of one that had not, or that never went on.
        """
        self._all.retries.labels(*self._who, how).inc()
        if pause_s is not None:
            self._all.resume_pause.labels(self._who[0]).observe(pause_s)

    def kv_recomputed(self, reason: str) -> None:
        """The decode worker recomputed the prompt."""
        self._all.kv_recomputes.labels(*self._who, self._all.limit_reason(reason)).inc()

    def kv_transferred(self, num_bytes: int) -> None:
        """The decode worker pulled the prompt's KV."""
        self._all.kv_transfer_bytes.labels(*self._who).inc(num_bytes)

    def finished(
        self,
        path: Path,
        outcome: Outcome,
        *,
        e2e_s: float,
        ttft_s: float | None = None,
        num_output_tokens: int = 0,
        num_choices: int = 1,
        own_targets: SloTargets | None = None,
    ) -> SloResult | None:
        """A request ended, in whatever way.

        Args:
            path: the way it went last; ``none`` if no worker had it.
            outcome: how it ended for its client.
            e2e_s: arrival to last token, or to the end if there was none.
            ttft_s: arrival to first token; None if there was none.
            num_output_tokens: of all choices together.
            num_choices: the request's ``n``.
            own_targets: what the request is held to; None for its model's targets.

        Returns:
            What it adds to attainment; None if it does not count.
        """
        metrics, who = self._all, self._who
        metrics.inflight.labels(*who).dec()
        metrics.requests.labels(*who, path, outcome).inc()
        tpot_s = time_per_output_token_s(ttft_s, e2e_s, num_output_tokens / num_choices)
        if outcome is Outcome.OK:
            metrics.e2e.labels(*who).observe(e2e_s)
            if tpot_s is not None:
                metrics.tpot.labels(*who).observe(tpot_s)
        targets = own_targets or self._slo_targets
        if targets is None:
            return None
        result = judge(targets, outcome, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s)
        if result is not None:
            metrics.slo_requests.labels(*who, result).inc()
        return result
