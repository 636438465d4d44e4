"""The schema of the configuration file.

The types are strict: ``"4"`` is not a number. The docstring under a field is its line in
docs/configuration.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from core.types import Role

PositiveSeconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=40)]
"""Usable in a deployment name, a metric label and a Kubernetes name."""


def _absolute_if_local(path: str) -> str:
    """Local paths become absolute, because workers run in other directories; hub ids stay."""
    local = Path(path).expanduser()
    return str(local.absolute()) if path.startswith((".", "~")) or local.exists() else path


ModelPath = Annotated[str, Field(min_length=1), AfterValidator(_absolute_if_local)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class SloConfig(_Section):
    """Latency targets of a model. A request counts towards goodput when it meets both."""

    ttft_ms: Annotated[float, Field(gt=0)]
    """Time to first token, in milliseconds."""
    tpot_ms: Annotated[float, Field(gt=0)]
    """Mean time per output token after the first, in milliseconds."""


class AdapterConfig(_Section):
    """A LoRA adapter, served under its own name beside the base model."""

    name: Name
    """The model name that clients send to get this adapter."""
    path: ModelPath
    """PEFT directory or hub id of the adapter."""


class InitialRoles(_Section):
    """How many of a shape's workers start in each role."""

    prefill: Count = 0
    """Workers that start as prefill workers."""
    decode: Count = 0
    """Workers that start as decode workers."""


class MockConfig(_Section):
    """Timing and size of the mock engine."""

    prefill_ms_per_1k_tokens: Annotated[float, Field(ge=0)] = 20.0
    """Time to prefill 1000 prompt tokens, in milliseconds."""
    decode_step_ms: Annotated[float, Field(ge=0)] = 10.0
    """Time of one decode step of the whole batch, in milliseconds."""
    kv_blocks: PositiveCount = 4096
    """KV cache of one worker, in blocks."""
    block_size_tokens: PositiveCount = 16
    """Tokens in a KV block."""


class ShapeConfig(_Section):
    """Interchangeable workers: same accelerator, same parallelism, same engine arguments."""

    name: Label
    """Unique within the model; part of deployment names and metric labels."""
    count: PositiveCount
    """Workers of this shape, at start and as long as the planner leaves it so."""
    min_count: Count | None = None
    """Fewest workers that a planner in mode `auto` may leave it. Null: `count`."""
    max_count: PositiveCount | None = None
    """Most workers that a planner in mode `auto` may ask for. Null: `count`."""
    roles: tuple[Role, ...] = (Role.PREFILL, Role.DECODE)
    """Roles its workers may take, now or after a role switch."""
    initial: InitialRoles
    """Split of `count` over the roles at start."""
    gpus_per_worker: Annotated[float, Field(ge=0)]
    """GPUs that Ray reserves for one worker: the tensor parallel size, or 0 for a CPU worker. Workers with a
    value under 1 share a GPU."""
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    """CPU cores that Ray reserves for one worker."""
    engine: Literal["vllm", "mock"] = "vllm"
    """`vllm` runs the model; `mock` only keeps time, for scale and timing tests."""
    engine_args: dict[str, Any] = {}
    """Arguments passed through to vLLM's AsyncEngineArgs, by their Python names."""
    env: dict[str, str] = {}
    """Environment variables of the engine's processes."""
    mock: MockConfig | None = None
    """Only with `engine: mock`."""
    profile: Name | None = None
    """Performance profile of its workers, a file or a packaged name: what the router predicts from and what
    `baton simulate` computes with. Without one the router learns how long steps take as it goes."""

    @property
    def counts(self) -> range:
        """Every number of workers it may have."""
        least = self.count if self.min_count is None else self.min_count
        most = self.count if self.max_count is None else self.max_count
        return range(least, most + 1)


class ModelConfig(_Section):
    """One served model, its targets and its workers."""

    name: Name
    """The model name that clients send."""
    path: ModelPath
    """Hugging Face directory or hub id."""
    revision: Name | None = None
    """Hub revision: branch, tag or commit. Null takes the hub's default."""
    slo: SloConfig
    """Latency targets."""
    adapters: tuple[AdapterConfig, ...] = ()
    """LoRA adapters served on this model."""
    shapes: tuple[ShapeConfig, ...]
    """The workers, by shape."""


class AdmissionConfig(_Section):
    """Which request goes to the workers next, which waits, which is refused. Each router replica has a line
    of its own: by priority, fair between tenants, earliest deadline first."""

    enabled: bool = True
    """Off sends every request to the workers at once, in the order of arrival."""
    early_rejection: bool = True
    """Refuse with 429 and `Retry-After` what will not meet its TTFT target; off lets it wait."""
    max_queue_requests: Count = 1024
    """Requests that wait in one router replica; more are refused, the least urgent first."""
    max_wait_s: PositiveSeconds = 60.0
    """Seconds a request waits at most; then it is refused with 503."""
    aging_s: PositiveSeconds = 5.0
    """Seconds after which a waiting request moves up one priority class."""
    dispatch_ahead_s: PositiveSeconds = 0.1
    """A request is sent to its prefill worker this many seconds before the worker can begin with it."""
    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Shares of tenants, named by their `X-Baton-Tenant`, in relation to each other; 1 for everybody else."""


class RouterConfig(_Section):
    """The OpenAI front end."""

    replicas: PositiveCount = 1
    """Router processes. Each holds its own streams; HAProxy spreads the load."""
    host: Name = "127.0.0.1"
    """Address to listen on. `0.0.0.0` opens the cluster to the network."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """HTTP port."""
    policy: Literal["predictive", "least_load", "power_of_two", "round_robin", "random"] = "predictive"
    """Who gets a request. `predictive` goes by predicted TTFT and TPOT, caches included; the others know only
    load or not even that, and exist for comparison."""
    cache_events: bool = True
    """Let workers tell the routers what their prefix caches hold. Off, or with a policy other than
    `predictive`, routers guess from what they have sent."""
    log_decisions: bool = False
    """Keep and log what each routing decision was made from: every worker with its score. Without it, only
    for requests with the header `X-Baton-Explain: 1`."""
    admission: AdmissionConfig = AdmissionConfig()
    """Which request goes next, which waits, which is refused."""
    max_ongoing_requests: PositiveCount = 4096
    """Requests in flight in one router replica, those that wait among them; more are refused with 503."""
    haproxy: bool = True
    """Let HAProxy talk to the router replicas; off sends every chunk through Ray Serve's Python proxy."""
    stream_hard_stop_s: PositiveCount = 3600
    """How long a stream may go on, in seconds, after the set of router replicas has changed."""
    prefill_timeout_s: PositiveSeconds = 60.0
    """Seconds in which a worker must give a request its first token; then the request goes on elsewhere."""
    stall_timeout_s: PositiveSeconds = 30.0
    """Seconds for which a decode worker may then be silent; after that the answer goes on elsewhere."""
    resume_timeout_s: PositiveSeconds = 30.0
    """Seconds that a request which has lost its worker waits, if no other one is there, until it fails."""
    max_retries: Count = 3
    """Times a request goes on elsewhere after it has lost a worker. A request that ends every engine it runs
    on ends one more than that."""
    chat_template: ModelPath | None = None
    """Path of a Jinja chat template. Null takes the model's own."""
    vllm_args: tuple[str, ...] = ()
    """Further command-line arguments for vLLM's OpenAI front end, such as
    `[--enable-auto-tool-choice, --tool-call-parser, hermes]`."""


class KvTransferConfig(_Section):
    """How KV blocks travel from prefill to decode workers."""

    backend: Name = "UCX"
    """NIXL backend."""
    backend_params: dict[str, Any] = {}
    """Further entries of vLLM's `kv_connector_extra_config`, such as `num_threads`."""
    buffer_device: Literal["cpu", "cuda"] = "cuda"
    """Memory that NIXL reads and writes. CPU workers need `cpu`."""
    lease_s: PositiveCount = 30
    """Seconds that a prefill worker keeps a finished prompt's KV for a pull, unless the lease is renewed; no
    pull takes longer."""


class PlannerConfig(_Section):
    """Who decides the workers' roles, and how many workers there are."""

    mode: Literal["off", "advise", "auto"] = "off"
    """`off` leaves every worker in its initial role. `advise` decides, shows what it would do, and does
    nothing. `auto` carries it out."""
    interval_s: PositiveSeconds = 1.0
    """Seconds between two decisions."""
    stale_after_s: PositiveSeconds = 5.0
    """What a worker or a router said longer ago is not gone by."""
    gpu_budget: Annotated[float, Field(gt=0)] | None = None
    """GPUs that the workers of all shapes may hold together; a CPU worker counts as one. Null is what the
    shapes may have at most."""
    attainment_target: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of requests within both targets, of those that could be, that is worth another GPU."""
    spares: Count = 0
    """Workers kept beyond what the load asks for."""
    hold_s: Annotated[float, Field(ge=0)] | None = None
    """Seconds for which fewer GPUs must have been enough before one is given back. Null is as long as one
    takes to start."""


class RegistryConfig(_Section):
    """Membership: which workers exist and how they do."""

    heartbeat_s: PositiveSeconds = 1.0
    """Seconds between two heartbeats of a worker."""
    missed_heartbeats: PositiveCount = 3
    """Heartbeats a worker may miss in a row before it leaves the cluster."""


class RayConfig(_Section):
    """The Ray cluster to run on."""

    address: Name | None = None
    """Address of a running cluster, or `auto`. Null starts one on this machine and ends it with Baton."""
    num_cpus: PositiveCount | None = None
    """CPU cores of the cluster started here. Null takes what the machine has."""
    dashboard: bool = False
    """Start Ray's dashboard with the cluster."""


class BatonConfig(_Section):
    """The whole file."""

    models: tuple[ModelConfig, ...]
    """The served models: exactly one."""
    router: RouterConfig = RouterConfig()
    """The OpenAI front end."""
    kv_transfer: KvTransferConfig = KvTransferConfig()
    """How KV blocks travel."""
    planner: PlannerConfig = PlannerConfig()
    """Who decides the roles and the number of workers."""
    registry: RegistryConfig = RegistryConfig()
    """Membership."""
    ray: RayConfig = RayConfig()
    """The Ray cluster."""
    startup_timeout_s: PositiveSeconds = 600.0
    """Seconds in which a worker must load its model and be ready."""
    drain_timeout_s: PositiveSeconds = 120.0
    """Seconds a worker that shuts down may take to finish what it has. Then streams go on elsewhere."""
    hang_timeout_s: PositiveSeconds = 20.0
    """Seconds an engine may not answer, which must be longer than its longest step. Then its streams go on
    elsewhere and it gets no requests until it answers; after three times as long Ray Serve replaces it."""
