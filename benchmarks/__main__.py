"""``python -m benchmarks``: all benchmarks, or one of them by name."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import (
    decision_cost,
    faults,
    fidelity,
    latency,
    machine,
    overload,
    planner,
    planner_live,
    planner_live_plot,
    planner_plot,
    prefix_index,
    report,
    router_ceiling,
    routing,
    simulator_speed,
    waterfall,
)
from benchmarks.load import LoadGenerator
from benchmarks.model import CACHE, PromptMaker, make_bench_model
from benchmarks.servers import PlainVllm, baton_config
from benchmarks.table import Table
from deploy.cluster import Cluster
from deploy.tiny_model import make_tiny_model

app = typer.Typer(help="Benchmarks of Baton; results go to docs/benchmarks.md.", add_completion=False)
console = Console()
Quick = Annotated[bool, typer.Option(help="A few rounds only; prints the tables and writes nothing.")]


@app.callback(invoke_without_command=True)
def everything(context: typer.Context, quick: Quick = False) -> None:
    """Run all benchmarks; name one to run it alone."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if context.invoked_subcommand is None:
        _against_plain_vllm(("latency", "waterfall"), quick)
        router(quick)


@app.command("latency")
def latency_alone(quick: Quick = False) -> None:
    """TTFT, TPOT, gaps and throughput against plain vLLM, interleaved."""
    _against_plain_vllm(("latency",), quick)


@app.command("waterfall")
def waterfall_alone(quick: Quick = False) -> None:
    """Where each millisecond goes on the way to the first and second token."""
    _against_plain_vllm(("waterfall",), quick)


@app.command()
def router(quick: Quick = False) -> None:
    """The router's ceiling with mock workers; frames against per-request streams."""
    model_dir = make_bench_model()
    rounds = router_ceiling.QUICK_ROUNDS if quick else router_ceiling.ROUNDS
    with LoadGenerator() as load, _progress() as progress:
        result = router_ceiling.measure(load, PromptMaker(model_dir, seed=2), model_dir, rounds, progress)
    _finish("router", result, router_ceiling.tables(result), quick)


@app.command("fidelity")
def fidelity_alone(quick: Quick = False) -> None:
    """The simulator against real, paced engines: TTFT, TPOT and attainment of a bursty load."""
    from deploy.profiling.command import run_profile

    model_dir = make_tiny_model(CACHE / "tiny-model")
    config = baton_config(model_dir, router=fidelity.ROUTER, **fidelity.shape())
    seconds = fidelity.QUICK_SECONDS if quick else fidelity.SECONDS
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(_progress())
        load = stack.enter_context(LoadGenerator())
        cluster = stack.enter_context(Cluster(config, progress))
        profile_path = CACHE / "fidelity-profile.json"
        result = fidelity.measure(
            load,
            cluster.url,
            config.router.port,
            lambda: run_profile(cluster.url, profile_path, max_minutes=1.5 if quick else 4.0),
            seconds,
            progress,
        )
    _finish("fidelity", fidelity.as_json(result), fidelity.tables(result), quick, report.SIMULATOR)


@app.command("simulator")
def simulator_alone(quick: Quick = False) -> None:
    """What a simulation costs, by requests and by workers."""
    with _progress() as progress:
        cases = simulator_speed.QUICK_CASES if quick else simulator_speed.CASES
        costs = simulator_speed.measure(cases, progress)
    if not quick:
        simulator_speed.plot(costs, report.SIMULATOR.parent / "images" / "simulator-speed.png")
    section = "simulator-speed"
    _finish(section, simulator_speed.as_json(costs), simulator_speed.tables(costs), quick, report.SIMULATOR)


@app.command("routing")
def routing_alone(quick: Quick = False) -> None:
    """Routing policies side by side in the simulator, on public traces (docs/benchmarks.md says which)."""
    grid = routing.QUICK if quick else routing.FULL
    with _progress() as progress:
        results = routing.measure(grid, progress)
    _finish("routing", routing.as_json(results), routing.tables(results, grid), quick)


@app.command("overload")
def overload_alone(quick: Quick = False) -> None:
    """Three times the load, with admission control and without, in the simulator."""
    with _progress() as progress:
        runs = overload.measure(overload.QUICK_SHARE if quick else 1.0, progress)
    _finish("overload", {"runs": overload.as_json(runs)}, overload.tables(runs), quick)


@app.command("planner")
def planner_alone(quick: Quick = False) -> None:
    """The planner against static splits and an oracle, in the simulator."""
    with _progress() as progress:
        results = planner.measure(planner.QUICK if quick else planner.FULL, progress)
    if not quick and (shown := planner.shown(results)) is not None:
        planner_plot.plot(shown, report.DOCUMENT.parent / "images" / "planner-phase-shift.png")
    _finish("planner", planner.as_json(results), planner.tables(results), quick)


@app.command("planner-live")
def planner_live_alone(quick: Quick = False) -> None:
    """The planner in charge of real, paced engines: a load that turns to long answers and back."""
    model_dir = make_tiny_model(CACHE / "tiny-model")
    with _progress() as progress:
        run = planner_live.measure(model_dir, CACHE, quick, progress)
    if not quick:
        planner_live_plot.plot(run, report.DOCUMENT.parent / "images" / "planner-live.png")
    _finish("planner-live", planner_live.as_json(run), planner_live.tables(run), quick)


@app.command("faults")
def faults_alone(
    quick: Quick = False,
    system: Annotated[
        list[str] | None, typer.Option(help="Only this one, may be repeated; then nothing is written.")
    ] = None,
) -> None:
    """The same faults on Baton, vllm-router and Ray Serve LLM, side by side; about 15 minutes."""
    model_dir = make_tiny_model(CACHE / "tiny-model")
    logs = CACHE / "faults-logs"
    results = faults.measure(model_dir, logs, system or list(faults.SYSTEMS), _timed_line)
    partial = quick or system is not None
    _finish("faults", {"systems": faults.as_json(results)}, faults.tables(results), partial)


@app.command("decision")
def decision_alone(quick: Quick = False) -> None:
    """What a routing decision costs among 256 workers."""
    with _progress() as progress:
        num_decisions = decision_cost.QUICK_DECISIONS if quick else decision_cost.DECISIONS
        costs = decision_cost.measure(num_decisions, progress)
    _finish("decision", decision_cost.as_json(costs), decision_cost.tables(costs), quick)


@app.command("prefix-index")
def prefix_index_alone(quick: Quick = False) -> None:
    """Memory and time of the index of cached prefixes, and of naming a prompt's blocks."""
    with _progress() as progress:
        num_entries = prefix_index.QUICK_NUM_ENTRIES if quick else prefix_index.NUM_ENTRIES
        costs = prefix_index.measure(num_entries, progress)
    _finish("prefix-index", prefix_index.as_json(costs), prefix_index.tables(costs), quick)


def _against_plain_vllm(parts: tuple[str, ...], quick: bool) -> None:
    model_dir = make_bench_model()
    prompts, config = PromptMaker(model_dir, seed=1), baton_config(model_dir)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(_progress())
        load = stack.enter_context(LoadGenerator())
        cluster = stack.enter_context(Cluster(config, progress))
        port = config.router.port
        if "latency" in parts:
            progress("starting plain vLLM")
            with PlainVllm(model_dir, config) as plain:
                ports = {latency.PLAIN: plain.port, latency.BATON: port}
                rounds = latency.QUICK_ROUNDS if quick else latency.ROUNDS
                summary = latency.summarize(latency.measure(load, prompts, ports, rounds, progress))
            _finish("latency", summary, latency.tables(summary), quick)
        if "waterfall" in parts:
            requests = waterfall.QUICK_REQUESTS if quick else waterfall.REQUESTS
            result = waterfall.measure(load, prompts, cluster.url, port, requests, progress)
            _finish("waterfall", result, waterfall.tables(result), quick)


def _timed_line(text: str) -> None:
    console.print(time.strftime("%X"), text, highlight=False)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    with console.status("starting") as status:
        yield status.update


def _finish(
    section: str,
    result: Mapping[str, Any],
    tables: list[Table],
    quick: bool,
    document: Path = report.DOCUMENT,
) -> None:
    for table in tables:
        console.print(table.rich(), "")
    if not quick:
        report.save(section, result, tables, document)
        facts = machine.describe()
        report.save("machine", facts, [Table("Machine and versions", ["", ""], list(facts.items()))])


if __name__ == "__main__":
    app()
