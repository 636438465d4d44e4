"""The baton command. Imports that take long wait until a command needs them."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from core.errors import BatonError, ConfigError
from deploy.cli_explain import explain
from deploy.cli_plan import plan
from deploy.cli_planner import planner_app
from deploy.cli_profile import profile
from deploy.cli_simulate import simulate
from deploy.cli_targets import only_run, url_of

if TYPE_CHECKING:
    from deploy.config_schema import BatonConfig
    from deploy.detached import Reporter


class _Commands(TyperGroup):
    """One message for each error, instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        from deploy.cli_output import report

        try:
            return super().invoke(ctx)
        except BatonError as error:
            raise typer.Exit(report(error)) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve a large language model with prefill and decode on separate workers, on one Ray cluster.",
    add_completion=False,
    epilog="""Start here:

baton demo                      try it on this machine's CPU

baton validate cluster.yaml     is this configuration right?

baton serve cluster.yaml        start a cluster and serve

Configurations to start from are in deploy/configs, every key is in docs/configuration.md.

Exit status: 0 done, 1 failed, 2 wrong configuration or command line.
BATON_LOG_LEVEL=DEBUG shows tracebacks.""",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (YAML).")]


@app.command(
    epilog="""Examples:

baton serve cluster.yaml              until Ctrl-C

baton serve cluster.yaml --detach     in the background, until baton stop

The first Ctrl-C (or SIGTERM) lets requests finish, for drain_timeout_s at most.
The second ends all at once."""
)
def serve(
    config_file: ConfigFile,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run in the background; return when it is ready.")
    ] = False,
    report_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Start a cluster, wait until it is ready, and serve."""
    from deploy.cli_output import error_text, exit_code
    from deploy.config import load_config
    from deploy.detached import Reporter

    if detach:
        _serve_detached(config_file, load_config(config_file))
        return
    reporter = Reporter(report_fd) if report_fd is not None else None
    try:
        _serve_here(load_config(config_file), reporter)
    except BatonError as error:
        if reporter:
            reporter.failed(error_text(error), exit_code(error))
        raise


def _serve_here(config: BatonConfig, reporter: Reporter | None) -> None:
    from deploy.cli_output import messages, phase_lines
    from deploy.foreground import running_cluster, wait_for_signal

    with contextlib.ExitStack() as stack:
        with phase_lines() as show:

            def progress(phase: str) -> None:
                show(phase)
                if reporter:
                    reporter.phase(phase)

            cluster = stack.enter_context(running_cluster(config, progress))
        _print_ready(cluster.url)
        if reporter:
            reporter.ready(cluster.mark)
        else:
            messages().print("Ctrl-C lets requests finish and stops it; a second Ctrl-C ends it at once.")
        wait_for_signal(cluster)


def _serve_detached(config_file: Path, config: BatonConfig) -> None:
    from deploy import detached
    from deploy.cli_output import output, phase_lines

    with phase_lines() as show:
        run = detached.start(config_file.absolute(), config, show)
    _print_ready(run.url)
    output().print(f"process {run.pid}, log {run.log}\n`baton stop {run.port}` ends it.", soft_wrap=True)


@app.command(
    epilog="""Examples:

baton status                            what --detach started, or port 8000

baton status 8100                       a port of this machine

baton status cluster.yaml               what this file describes

baton status http://head:8000 --json    for a script"""
)
def status(
    target: Annotated[
        str | None, typer.Argument(metavar="[PORT|URL|CONFIG]", help="Which cluster.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the router answers.")] = False,
) -> None:
    """Show pools and workers: roles, states, load, KV cache use; who is quarantined, and why."""
    from deploy.cli_output import output
    from deploy.cli_tables import pools_table, troubles, workers_table
    from deploy.cluster import fetch_status

    answer = fetch_status(url_of(target))
    if as_json:
        typer.echo(json.dumps(answer, indent=1))
        return
    output().print(pools_table(answer["workers"]), workers_table(answer["workers"]))
    for line in troubles(answer["workers"], answer.get("suspect_nodes", ())):
        output().print(f"[red]![/] {escape(line)}", soft_wrap=True)


@app.command(
    epilog="""Example:

baton validate deploy/configs/2-nodes-70b.yaml"""
)
def validate(config_file: ConfigFile) -> None:
    """Check a configuration file: one line if it is right, or everything that is wrong with it."""
    from deploy.cli_output import messages, output
    from deploy.config import load_config
    from deploy.config_checks import require_local_files

    config = load_config(config_file)
    output().print(f"[green]ok[/] {escape(str(config_file))}: {escape(_summary(config))}", soft_wrap=True)
    try:
        require_local_files(config)
    except ConfigError as error:
        messages().print(f"note: on this machine, {error}", markup=False, soft_wrap=True)


@app.command(
    epilog="""Examples:

baton stop            the only cluster in the background

baton stop 8100       the one on this port"""
)
def stop(port: Annotated[int | None, typer.Argument(help="Its port.", show_default=False)] = None) -> None:
    """Stop what `baton serve --detach` started; requests in flight may finish."""
    from deploy import detached
    from deploy.cli_output import output

    run = detached.find(port) if port is not None else only_run()
    if run is None:
        where = "" if port is None else f" on port {port}"
        output().print(f"nothing to stop: no cluster runs in the background{where}")
        return
    with output().status(f"stopping {run.url}; requests may finish"):
        was_alive = detached.stop(run)
    how = "stopped" if was_alive else "had ended already, log " + run.log + ":"
    output().print(f"{how} {run.url} (process {run.pid})", soft_wrap=True)


@app.command(
    epilog="""Examples:

baton demo                                  with a tiny model made on the spot

baton demo --keep                           then send requests of your own

BATON_DEMO_MODEL=/path/to/model baton demo  with any small Hugging Face model"""
)
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Go on serving after the demo, until Ctrl-C.")] = False,
) -> None:
    """Run two prefill and two decode workers on this machine's CPU, show who does what, and a role switch."""
    from deploy.demo import run_demo

    run_demo(keep=keep)


app.command(
    epilog="""Examples:

baton simulate --trace requests.csv                             4 + 4 workers of an H200 profile

baton simulate --trace requests.jsonl.gz --rate-scale 2 --html report.html --json -

baton simulate --trace poisson:rate=20,prompt=3000,output=300,duration=10m --prefill 3 --decode 5

baton simulate --trace requests.csv --config cluster.yaml --profile measured.json

baton simulate --trace requests.csv --action '120 kill prefill-0'      a fault on the way

Loads: poisson, bursts, sinusoid, phases, sessions; docs/simulator.md has their grammar."""
)(simulate)


app.command(
    epilog="""Examples:

baton profile --out h100.json --plot h100.png       a worker of the cluster on this machine

baton profile http://head:8000 --shape h100-tp2

baton profile cluster.yaml --fresh                  an engine of its own, its start timed too"""
)(profile)


app.command(
    epilog="""Examples:

baton plan --trace requests.csv --gpus 8

baton plan --trace requests.csv --gpus 16 --profile tp2.json --profile tp4.json      mixes of TP sizes too

baton plan --trace requests.csv --ttft-ms 300 --tpot-ms 20 --busiest-minutes 10 --json plan.json"""
)(plan)


app.command(
    epilog="""Examples:

baton explain chatcmpl-9f2c...                        a request sent with the header X-Baton-Explain: 1

baton explain --prompt "What is a baton?"             where this would go now, and why"""
)(explain)


app.add_typer(planner_app, name="planner")


def _print_ready(url: str) -> None:
    from deploy.cli_output import output
    from deploy.cli_tables import pools_table
    from deploy.cluster import fetch_status

    output().print(pools_table(fetch_status(url)["workers"]))
    output().print(f"ready: {url}/v1", soft_wrap=True)


def _summary(config: BatonConfig) -> str:
    (model,) = config.models
    shapes = ", ".join(
        f"{shape.count} x {shape.name} ({shape.initial.prefill} prefill, {shape.initial.decode} decode)"
        for shape in model.shapes
    )
    return f"model {model.name}, workers {shapes}, port {config.router.port}"


def main() -> None:
    """Entry point of the ``baton`` command."""
    try:
        app()
    except Exception as error:
        from deploy.cli_output import report

        sys.exit(report(error))


if __name__ == "__main__":
    main()
