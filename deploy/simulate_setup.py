"""From the options of `baton simulate` and `baton plan` to what is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError
from core.performance_profile import PerformanceProfile
from core.types import Role
from deploy.config import load_config
from deploy.planner_settings import planner_settings
from deploy.settings import admission_limits
from deploy.simulate_planner import PlannerOptions, planner_record, simulated_planner
from planner.settings import PlannerSettings
from router.admission_limits import AdmissionLimits
from router.policies import DEFAULT_POLICY, make_policy
from simulator.profiles.files import find_profile
from simulator.result import Slo
from simulator.scenario import static_cluster, worker_group
from simulator.spec import ClusterSpec
from simulator.traces.edits import head, scale_rate, window
from simulator.traces.generator_text import is_workload, workload_from_text
from simulator.traces.generators import generate
from simulator.traces.readers import read_trace
from simulator.traces.trace import Trace

if TYPE_CHECKING:
    from deploy.config_schema import BatonConfig, ModelConfig, ShapeConfig

DEFAULT_PROFILE = "h200-llama-3.1-8b-fp8-tp1"
DEFAULT_SLO = Slo(ttft_s=0.5, tpot_s=0.03)
DEFAULT_WORKERS = 4
_LIMITS = ("max_num_seqs", "max_num_batched_tokens")
"""Engine arguments that replace the profile's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What to take from a trace."""

    trace: str
    """A file, or a load in one line (``simulator/traces/generator_text.py``)."""
    columns: str = ""
    """``field=column`` pairs, separated by commas, for files of an unknown layout."""
    rate_scale: float = 1.0
    start_s: float = 0.0
    duration_s: float | None = None
    num_requests: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What to run it on; None and empty mean the configuration's, or the built-in default."""

    config_file: Path | None = None
    profiles: Sequence[str] = ()
    """Names or files, for all shapes or as ``shape=profile``; without a configuration file the shapes are
    called prefill and decode."""
    num_prefill: int | None = None
    num_decode: int | None = None
    num_routers: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    policy: str | None = None
    admission: bool | None = None
    planner: PlannerOptions = field(default_factory=PlannerOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSetup:
    """Everything a simulation needs."""

    trace: Trace
    cluster: ClusterSpec
    slo: Slo
    policy: str = DEFAULT_POLICY
    settings: dict[str, Any] = field(default_factory=dict)
    """What was chosen, for the record."""


def load_trace(options: TraceOptions) -> Trace:
    """
    Raises:
        ConfigError: there is no such trace, or nothing is left of it.
    """
    if is_workload(options.trace):
        trace = generate(workload_from_text(options.trace), options.seed)
    else:
        columns = _pairs(options.columns, "--columns") if options.columns else None
        trace = read_trace(Path(options.trace), columns=columns, seed=options.seed)
    if options.start_s or options.duration_s is not None:
        end_s = float("inf") if options.duration_s is None else options.start_s + options.duration_s
        trace = window(trace, options.start_s, end_s)
    if options.num_requests is not None:
        trace = head(trace, num_requests=options.num_requests)
    if options.rate_scale != 1.0:
        trace = scale_rate(trace, options.rate_scale)
    if not trace.requests:
        raise ConfigError(f"nothing of the trace {options.trace} is left to simulate")
    return trace


def set_up(trace_options: TraceOptions, options: ClusterOptions) -> SimulationSetup:
    """
    Raises:
        ConfigError: an option or a file is wrong.
    """
    trace = load_trace(trace_options)
    settings: dict[str, Any] = {
        "trace": trace_options.trace,
        "rate_scale": trace_options.rate_scale,
        "seed": trace_options.seed,
    }
    policy: str = DEFAULT_POLICY
    limits: AdmissionLimits | None = None
    configured: PlannerSettings | None = None
    plans = bool(options.planner.enabled)
    if options.config_file is not None:
        config = load_config(options.config_file)
        cluster, slo = _configured(trace, options, config)
        settings["config"] = str(options.config_file)
        policy, limits = config.router.policy, admission_limits(config.router.admission)
        configured = planner_settings(config, config.models[0], {})
        if options.planner.enabled is None:
            plans = config.planner.mode == "auto"
    else:
        cluster, slo = _built_in(trace, options)
    if options.admission is not None:
        limits = (limits or AdmissionLimits()) if options.admission else None
    policy = options.policy or policy
    make_policy(policy)
    slo = slo_of(options.ttft_ms, options.tpot_ms, slo)
    cluster = replace(cluster, ttft_slo_s=slo.ttft_s, tpot_slo_s=slo.tpot_s, admission=limits)
    if plans:
        planner = simulated_planner(cluster, slo, options.planner, configured)
        cluster = replace(cluster, planner=planner)
        settings["planner"] = planner_record(planner)
    else:
        options.planner.refuse_counts()
    settings["policy"] = policy
    settings["admission"] = limits is not None
    settings["profiles"] = {group.shape: group.profile_name for group in cluster.groups}
    settings["workers"] = {
        group.shape: {role.value: count for role, count in group.num_workers.items()}
        for group in cluster.groups
    }
    settings["routers"] = cluster.num_routers
    return SimulationSetup(trace=trace, cluster=cluster, slo=slo, policy=policy, settings=settings)


def slo_of(ttft_ms: float | None, tpot_ms: float | None, default: Slo = DEFAULT_SLO) -> Slo:
    """
    Raises:
        ConfigError: a target is not more than 0.
    """
    ttft_s = default.ttft_s if ttft_ms is None else ttft_ms / 1e3
    tpot_s = default.tpot_s if tpot_ms is None else tpot_ms / 1e3
    if ttft_s <= 0 or tpot_s <= 0:
        raise ConfigError("--ttft-ms and --tpot-ms must be more than 0")
    return Slo(ttft_s=ttft_s, tpot_s=tpot_s)


def _built_in(trace: Trace, options: ClusterOptions) -> tuple[ClusterSpec, Slo]:
    profiles = _profiles(options.profiles, [Role.PREFILL.value, Role.DECODE.value], DEFAULT_PROFILE)
    cluster = static_cluster(
        trace,
        prefill=profiles[Role.PREFILL.value],
        num_prefill=_or(options.num_prefill, DEFAULT_WORKERS),
        decode=profiles[Role.DECODE.value],
        num_decode=_or(options.num_decode, DEFAULT_WORKERS),
        num_routers=_or(options.num_routers, 1),
    )
    return cluster, DEFAULT_SLO


def _configured(trace: Trace, options: ClusterOptions, config: BatonConfig) -> tuple[ClusterSpec, Slo]:
    if options.num_prefill is not None or options.num_decode is not None:
        raise ConfigError(
            "--prefill and --decode go without --config: the configuration says how many workers"
        )
    (model,) = config.models
    profiles = _profiles(options.profiles, [shape.name for shape in model.shapes], None, model)
    cluster = ClusterSpec(
        groups=tuple(
            worker_group(
                _with_engine_args(profiles[shape.name], shape),
                trace,
                {Role.PREFILL: shape.initial.prefill, Role.DECODE: shape.initial.decode},
                shape=shape.name,
                allowed_roles=frozenset(shape.roles),
                lease_s=float(config.kv_transfer.lease_s),
            )
            for shape in model.shapes
        ),
        num_routers=_or(options.num_routers, config.router.replicas),
        max_ongoing_requests=config.router.max_ongoing_requests,
        heartbeat_s=config.registry.heartbeat_s,
        missed_heartbeats=config.registry.missed_heartbeats,
        prefill_timeout_s=config.router.prefill_timeout_s,
        stall_timeout_s=config.router.stall_timeout_s,
    )
    return cluster, Slo(ttft_s=model.slo.ttft_ms / 1e3, tpot_s=model.slo.tpot_ms / 1e3)


def _with_engine_args(profile: PerformanceProfile, shape: ShapeConfig) -> PerformanceProfile:
    """The profile under the limits that the shape sets itself."""
    limits = {name: shape.engine_args[name] for name in _LIMITS if name in shape.engine_args}
    return replace(profile, **limits) if limits else profile


def _profiles(
    given: Sequence[str], shapes: Sequence[str], default: str | None, model: ModelConfig | None = None
) -> dict[str, PerformanceProfile]:
    """The profile of each shape: its own, the configuration's, the one for all, or the default."""
    own: dict[str, str] = {}
    for text in given:
        shape, equals, name = text.partition("=")
        if equals and shape in shapes:
            own[shape] = name
        else:
            default = text
    if model is not None:
        own = {shape.name: shape.profile for shape in model.shapes if shape.profile is not None} | own
    missing = [shape for shape in shapes if shape not in own]
    if missing and default is None:
        raise ConfigError(
            f"no performance profile for {', '.join(missing)}: give --profile {missing[0]}=NAME, or set "
            f"profile: in the shape"
        )
    found: dict[str, PerformanceProfile] = {}
    chosen = {shape: own.get(shape) or str(default) for shape in shapes}
    for name in dict.fromkeys(chosen.values()):
        found[name] = find_profile(name)
    return {shape: found[name] for shape, name in chosen.items()}


def _pairs(text: str, option: str) -> dict[str, str]:
    pairs = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise ConfigError(f"{option} takes field=column pairs separated by commas, not {item!r}")
        pairs[key.strip()] = value.strip()
    return pairs


def _or(given: int | None, default: int) -> int:
    return default if given is None else given
