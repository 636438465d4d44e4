"""`baton plan`: the best static split for a trace."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.cli_simulate import (
    ColumnsOption,
    DurationOption,
    JsonOption,
    RateScaleOption,
    RequestsOption,
    SeedOption,
    StartOption,
    TpotOption,
    TraceOption,
    TtftOption,
    check_outputs,
    simulation_progress,
    write_text,
)

_Profiles = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="NAME|FILE",
        help="Kind of worker to consider, for either role; may be repeated, say for several TP sizes.",
    ),
]


def plan(
    trace: TraceOption,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs to split.")] = 8,
    json_file: JsonOption = None,
    profile: _Profiles = None,
    prefill_profile: Annotated[
        list[str] | None, typer.Option("--prefill-profile", help="Consider this one for prefill instead.")
    ] = None,
    decode_profile: Annotated[
        list[str] | None, typer.Option("--decode-profile", help="Consider this one for decode instead.")
    ] = None,
    ttft_ms: TtftOption = None,
    tpot_ms: TpotOption = None,
    max_gpus: Annotated[
        int | None,
        typer.Option("--max-gpus", min=1, help="Look no further for the GPUs that the targets need."),
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Simulate every split of the GPUs, not the promising ones.")
    ] = False,
    busiest_minutes: Annotated[
        float | None, typer.Option("--busiest-minutes", help="Plan for this long a busiest stretch only.")
    ] = None,
    planner: Annotated[
        bool, typer.Option("--planner", help="Simulate the planner, too, on the same GPUs.")
    ] = False,
    min_gpus: Annotated[
        int | None,
        typer.Option("--min-gpus", min=1, help="With --planner: it may give GPUs back down to so many."),
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes; default: all cores.")] = None,
    rate_scale: RateScaleOption = 1.0,
    start_s: StartOption = 0.0,
    duration_s: DurationOption = None,
    num_requests: RequestsOption = None,
    columns: ColumnsOption = "",
    seed: SeedOption = 0,
) -> None:
    """Find the best static split of GPUs for a trace, and the GPUs that 90, 95 and 99% attainment need."""
    from core.errors import ConfigError
    from deploy.cli_output import messages, output
    from deploy.decision_tables import decisions_table, planner_table
    from deploy.plan_tables import plan_view
    from deploy.simulate_setup import DEFAULT_PROFILE, TraceOptions, load_trace, slo_of
    from simulator.planning.planner_run import PlannerRun, run_planner
    from simulator.planning.static_plan import plan_static
    from simulator.profiles.files import find_profile
    from simulator.reports.summary import to_json

    check_outputs(json_file)
    if min_gpus is not None and not planner:
        raise ConfigError("--min-gpus goes with --planner: add it")
    either = profile or [DEFAULT_PROFILE]
    loaded = load_trace(
        TraceOptions(
            trace=trace,
            columns=columns,
            rate_scale=rate_scale,
            start_s=start_s,
            duration_s=duration_s,
            num_requests=num_requests,
            seed=seed,
        )
    )
    found = plan_static(
        loaded,
        slo_of(ttft_ms, tpot_ms),
        gpus,
        [find_profile(name) for name in prefill_profile or either],
        [find_profile(name) for name in decode_profile or either],
        max_gpus=max_gpus,
        busiest_minutes=busiest_minutes,
        exhaustive=exhaustive,
        jobs=jobs,
        seed=seed,
        on_progress=lambda line: messages().print(line, markup=False),
    )
    run: PlannerRun | None = None
    figures = found.to_dict()
    if planner:
        with simulation_progress(found.num_requests) as on_progress:
            run = run_planner(loaded, found, min_gpus=min_gpus, seed=seed, on_progress=on_progress)
        figures["planner"] = run.to_dict()
    if json_file is not None and str(json_file) == "-":
        typer.echo(to_json(figures), nl=False)
        return
    if json_file is not None:
        write_text(json_file, to_json(figures))
    output().print(plan_view(found))
    if run is not None:
        output().print(planner_table(found, run), decisions_table(run.result))
