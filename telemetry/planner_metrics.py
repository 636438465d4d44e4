"""What the planner measures: its looks, what they came to, and what it has learned."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from core.types import Role
from telemetry.catalog import Catalog

_Metric = TypeVar("_Metric", Counter, Gauge)

_CPU_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_VERDICTS = ("hold", "move", "blind")
FAILURES = ("observe", "decide", "switch", "scale", "loop")


class OfModel(Generic[_Metric]):
    """A metric whose first label, the model, is always the same."""

    def __init__(self, metric: _Metric, model: str) -> None:
        self._metric: _Metric = metric
        self._model = model
        self._shown: set[tuple[str, ...]] = set()

    def labels(self, *values: str) -> _Metric:
        """The child of these values of the other labels."""
        self._shown.add(values)
        return self._metric.labels(self._model, *values)

    def show_only(self, values: Mapping[str, float]) -> None:
        """Of a gauge with one other label: sets these children and takes away the rest."""
        assert isinstance(self._metric, Gauge)
        for (name,) in self._shown - {(name,) for name in values}:
            self._metric.remove(self._model, name)
        self._shown = {(name,) for name in values}
        for name, value in values.items():
            self._metric.labels(self._model, name).set(value)


class PlannerMetrics:
    """The metrics of the planner process. All methods are called from its event loop.

    Args:
        model: whose workers it plans; on every metric.
    """

    def __init__(self, registry: CollectorRegistry, *, model: str, mode: str) -> None:
        self.catalog = catalog = Catalog(registry)

        mode_gauge = catalog.gauge(
            "baton_planner_mode", "1", "Always 1; the label tells the mode (advise, auto).", ("model", "mode")
        )
        mode_gauge.labels(model, mode).set(1)
        self.present = OfModel(
            catalog.gauge(
                "baton_planner_present_workers",
                "workers",
                "Workers the planner sees, by the role they report.",
                ("model", "role"),
            ),
            model,
        )
        self.wanted = OfModel(
            catalog.gauge(
                "baton_planner_wanted_workers",
                "workers",
                "Workers by the role they are to have by the planner's last decision; in mode advise nobody"
                " tells them.",
                ("model", "role"),
            ),
            model,
        )
        self.decisions = OfModel(
            catalog.counter(
                "baton_planner_decisions_total",
                "decisions",
                f"Looks at the cluster that came to a decision, by verdict ({', '.join(_VERDICTS)}; blind:"
                " too little was known).",
                ("model", "verdict"),
            ),
            model,
        )
        self.role_changes = OfModel(
            catalog.counter(
                "baton_planner_role_changes_total",
                "changes",
                "Workers told to take another role.",
                ("model", "from_role", "to_role"),
            ),
            model,
        )
        self.failures = OfModel(
            catalog.counter(
                "baton_planner_failures_total",
                "failures",
                f"What the planner tried in vain ({', '.join(FAILURES)}); it holds and tries again.",
                ("model", "doing"),
            ),
            model,
        )
        self.cpu = catalog.histogram(
            "baton_planner_decision_cpu_seconds",
            "CPU time of one decision.",
            ("model",),
            buckets=_CPU_BUCKETS_S,
        ).labels(model)
        self._attainment = OfModel(
            catalog.gauge(
                "baton_planner_predicted_attainment",
                "ratio",
                "Share of requests predicted within both targets, with the split as it is (current) and as"
                " decided (chosen); not there while nothing is predicted.",
                ("model", "split"),
            ),
            model,
        )
        self._inputs = OfModel(
            catalog.gauge(
                "baton_planner_input",
                "as named",
                "What the last decision was made from: load seen and forecast, by name with unit.",
                ("model", "input"),
            ),
            model,
        )
        self.step_factor = OfModel(
            catalog.gauge(
                "baton_planner_step_time_factor",
                "ratio",
                "How long steps take over what the shape's profile says, as learned from the workers, by"
                " phase (prefill, decode).",
                ("model", "shape", "role", "phase"),
            ),
            model,
        )
        self.observation_age = catalog.gauge(
            "baton_planner_observation_age_seconds",
            "seconds",
            "Time since the registry last showed the planner the cluster, or since the planner's start.",
            ("model",),
        ).labels(model)
        # From zero, so that the first one is already an increase that Prometheus sees.
        for from_role, to_role in permutations(Role, 2):
            self.role_changes.labels(from_role, to_role)
        for verdict in _VERDICTS:
            self.decisions.labels(verdict)
        for doing in FAILURES:
            self.failures.labels(doing)

    def set_inputs(self, inputs: Mapping[str, float]) -> None:
        """Shows the inputs of the last decision and no older ones."""
        self._inputs.show_only(inputs)

    def set_attainment(self, *, current: float | None, chosen: float | None) -> None:
        """Shows the predicted attainment; None if nobody predicted it."""
        both = {"current": current, "chosen": chosen}
        self._attainment.show_only({split: value for split, value in both.items() if value is not None})
