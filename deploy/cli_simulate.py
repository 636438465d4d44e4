"""`baton simulate`: a trace on a simulated cluster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router.policies import DEFAULT_POLICY, POLICY_NAMES, make_policy

if TYPE_CHECKING:
    from simulator.result import SimulationResult

TraceOption = Annotated[
    str,
    typer.Option(
        "--trace",
        metavar="FILE|LOAD",
        help="Trace file (Mooncake, Azure, ServeGen, any CSV or JSONL; gzip too) or a load such as "
        "poisson:rate=5,prompt=3000,output=300,duration=10m.",
    ),
]
ColumnsOption = Annotated[
    str,
    typer.Option(
        "--columns",
        metavar="FIELD=COLUMN,...",
        help="Columns of a file with unknown names: arrival_s (a unit may follow: ts:ms), prompt_tokens, "
        "output_tokens, block_hashes.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Cluster to simulate; default: 4 prefill and 4 decode workers."),
]
ProfileOption = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="[SHAPE=]NAME|FILE",
        help="Performance profile: packaged, written by baton profile, or CSV tables. SHAPE= gives one shape "
        "its own; without --config the shapes are prefill and decode. Default: Llama-3.1-8B FP8 on H200.",
    ),
]
TtftOption = Annotated[float | None, typer.Option("--ttft-ms", help="SLO: time to first token.")]
TpotOption = Annotated[
    float | None, typer.Option("--tpot-ms", help="SLO: mean time per output token after the first.")
]
RateScaleOption = Annotated[
    float, typer.Option("--rate-scale", min=1e-6, help="Let the trace come this many times as fast.")
]
StartOption = Annotated[float, typer.Option("--start", min=0, help="Skip this many seconds of the trace.")]
DurationOption = Annotated[
    float | None, typer.Option("--duration", min=0, help="Take this many seconds of the trace.")
]
RequestsOption = Annotated[
    int | None, typer.Option("--requests", min=1, help="Take this many requests of the trace.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of everything drawn at random.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the figures here; - for standard output.")
]


def simulate(
    trace: TraceOption,
    json_file: JsonOption = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report with plots here.")] = None,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    num_prefill: Annotated[int | None, typer.Option("--prefill", min=0, help="Prefill workers.")] = None,
    num_decode: Annotated[int | None, typer.Option("--decode", min=1, help="Decode workers.")] = None,
    num_routers: Annotated[int | None, typer.Option("--routers", min=1, help="Router replicas.")] = None,
    ttft_ms: TtftOption = None,
    tpot_ms: TpotOption = None,
    rate_scale: RateScaleOption = 1.0,
    start_s: StartOption = 0.0,
    duration_s: DurationOption = None,
    num_requests: RequestsOption = None,
    columns: ColumnsOption = "",
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help=f"Routing policy: {', '.join(POLICY_NAMES)}; else the configuration's, or {DEFAULT_POLICY}.",
            show_default=False,
        ),
    ] = None,
    admission: Annotated[
        bool | None,
        typer.Option(
            "--admission/--no-admission",
            help="Whether requests wait in the routers and are refused; else as configured, or not.",
            show_default=False,
        ),
    ] = None,
    planner: Annotated[
        bool | None,
        typer.Option(
            "--planner/--no-planner",
            help="Whether the planner changes roles and counts; else as configured, or not.",
            show_default=False,
        ),
    ] = None,
    gpu_budget: Annotated[
        float | None,
        typer.Option("--gpu-budget", min=0, help="With --planner: GPUs it may use; it may add workers."),
    ] = None,
    min_workers: Annotated[
        list[str] | None,
        typer.Option("--min-workers", metavar="[SHAPE=]N", help="With --planner: fewest workers of a shape."),
    ] = None,
    max_workers: Annotated[
        list[str] | None,
        typer.Option("--max-workers", metavar="[SHAPE=]N", help="With --planner: most workers of a shape."),
    ] = None,
    action: Annotated[
        list[str] | None,
        typer.Option("--action", metavar="ACTION", help="A fault or a change, such as '120 kill SHAPE-0'."),
    ] = None,
    save_trace: Annotated[
        Path | None, typer.Option("--save-trace", help="Write the requests here (JSONL; .gz compresses).")
    ] = None,
    timing: Annotated[
        bool,
        typer.Option("--timing", help="Add what it took to simulate; without it one seed gives one file."),
    ] = False,
    seed: SeedOption = 0,
) -> None:
    """Simulate a trace: attainment, goodput and latencies, in seconds and without a GPU."""
    from deploy.cli_output import messages
    from deploy.simulate_planner import PlannerOptions
    from deploy.simulate_setup import ClusterOptions, TraceOptions, set_up
    from simulator.action_text import action_from_text
    from simulator.reports.summary import summarize
    from simulator.simulation import simulate as run_simulation
    from simulator.traces.writer import write_trace

    check_outputs(json_file, html_file, save_trace)
    actions = [action_from_text(text) for text in action or ()]
    setup = set_up(
        TraceOptions(
            trace=trace,
            columns=columns,
            rate_scale=rate_scale,
            start_s=start_s,
            duration_s=duration_s,
            num_requests=num_requests,
            seed=seed,
        ),
        ClusterOptions(
            config_file=config,
            profiles=profile or (),
            num_prefill=num_prefill,
            num_decode=num_decode,
            num_routers=num_routers,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            policy=policy,
            admission=admission,
            planner=PlannerOptions(
                enabled=planner,
                gpu_budget=gpu_budget,
                min_workers=min_workers or (),
                max_workers=max_workers or (),
            ),
        ),
    )
    if save_trace is not None:
        write_trace(setup.trace, save_trace)
    with simulation_progress(len(setup.trace.requests)) as on_progress:
        result = run_simulation(
            setup.trace,
            setup.cluster,
            make_policy=lambda router_seed: make_policy(setup.policy, router_seed),
            actions=actions,
            seed=seed,
            on_progress=on_progress,
        )
    settings = {**setup.settings, "actions": action or []}
    summary = summarize(result, setup.slo, settings=settings)
    if timing:
        summary["wall_s"] = result.wall_s
        if result.decisions:
            summary["planner_cpu_s"] = {"total": result.planner_cpu_s, "max": result.planner_cpu_max_s}
    if html_file is not None:
        started_s = time.perf_counter()
        from simulator.reports.report import render_report

        title = f"baton simulate: {result.trace_name}"
        write_text(html_file, render_report(result, summary, setup.slo, title=title))
        messages().print(f"report: {html_file} ({time.perf_counter() - started_s:.1f} s)", soft_wrap=True)
    show(result, summary, json_file)


def show(result: SimulationResult, summary: dict[str, Any], json_file: Path | None) -> None:
    """Writes the figures, and prints them unless standard output is where they go."""
    from deploy.cli_output import messages, output
    from deploy.decision_tables import decisions_table, planner_line
    from deploy.simulate_tables import latency_table, verdict
    from simulator.reports.summary import to_json

    wall = (
        f"simulated {result.simulated_s:,.0f} s in {result.wall_s:.1f} s "
        f"({summary['num_requests'] / max(result.wall_s, 1e-9):,.0f} requests/s)"
    )
    if json_file is not None and str(json_file) == "-":
        typer.echo(to_json(summary), nl=False)
        messages().print(wall)
        return
    if json_file is not None:
        write_text(json_file, to_json(summary))
    parts = [verdict(summary), latency_table(summary), wall]
    if result.decisions:
        parts += [planner_line(summary), decisions_table(result)]
    output().print(*parts, sep="\n")


def check_outputs(*files: Path | None) -> None:
    """Before anything is computed.

    Raises:
        ConfigError: there is no directory for one of the files.
    """
    from core.errors import ConfigError

    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {file}: there is no directory {file.parent}")


def write_text(path: Path, text: str) -> None:
    """
    Raises:
        ConfigError: the file cannot be written.
    """
    from core.errors import ConfigError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def simulation_progress(num_requests: int) -> Any:
    """A progress bar on standard error; yields what takes (ended, all)."""
    from deploy.cli_output import progress_bar

    return progress_bar("simulating", num_requests)
