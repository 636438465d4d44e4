"""The body of ``baton profile``: measure a worker, write its profile, draw it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as LiveProgress

from core.errors import ConfigError
from core.performance_profile import PerformanceProfile
from core.profile_fit import fit_linear
from deploy.cli_output import messages, output
from deploy.profiling.link import fit_link
from deploy.profiling.measure import Measurements, Measuring, OnProgress
from deploy.profiling.plan import GridSize, measurement_plan
from deploy.profiling.plot import check_plot_path, plot_profile
from deploy.profiling.target import Prompts, Target

_DEFAULT_STARTUP_S = 60.0


def run_profile(
    target: str,
    profile_path: Path,
    *,
    fresh: bool = False,
    shape: str | None = None,
    plot: Path | None = None,
    name: str | None = None,
    accelerator: str | None = None,
    max_minutes: float = 15.0,
    request_timeout_s: float = 120.0,
    grid: GridSize | None = None,
) -> PerformanceProfile:
    """Measures one worker and writes its profile.

    Args:
        target: address of a running cluster, ``http://host:port``; with ``fresh``, a configuration file.
        profile_path: JSON file to write.
        fresh: start an engine for the purpose, and measure its start too.
        shape: which workers; needed where there are several shapes.
        plot: PNG, SVG or PDF to draw points and fit into.
        name: of the profile; None for model, shape and accelerator.
        accelerator: what to call the hardware; None to ask it, where that can be done from here.
        max_minutes: time for measuring; points are left out where it does not suffice.
        request_timeout_s: longest wait for one prompt or one token.
        grid: how many points to measure at most.

    Raises:
        ConfigError: an argument is wrong, or there is nothing to measure.
        StartupError: engine or router do not answer.
        WorkerLost: the worker did not keep up with its time limits.
    """
    from simulator.profiles.files import write_profile

    if not max_minutes > 0:
        raise ConfigError(f"--max-minutes must be above 0, not {max_minutes:g}")
    for path in (profile_path, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no directory {path.absolute().parent}")
    if plot is not None:
        check_plot_path(plot)
    opened = _open(target, fresh, shape, accelerator, request_timeout_s)
    profile, measured = asyncio.run(_measure(opened, name, shape, 60 * max_minutes, grid or GridSize()))
    gc.collect()  # vLLM's engine cleans up badly while the interpreter exits
    write_profile(profile, profile_path)
    if plot is not None:
        plot_profile(profile, plot)
    _report(profile, measured, [path for path in (profile_path, plot) if path is not None])
    return profile


def _open(
    target: str, fresh: bool, shape: str | None, accelerator: str | None, timeout_s: float
) -> AbstractAsyncContextManager[Target]:
    if fresh:
        from deploy.profiling.engine_target import fresh_engine

        return fresh_engine(target, shape, accelerator, timeout_s)
    from deploy.profiling.cluster_target import running_worker

    return running_worker(target, shape, accelerator, timeout_s)


async def _measure(
    opened: AbstractAsyncContextManager[Target],
    name: str | None,
    shape: str | None,
    budget_s: float,
    grid: GridSize,
) -> tuple[PerformanceProfile, Measurements]:
    with _progress(budget_s) as on_progress:
        on_progress(0.0, "starting")
        async with opened as target:
            plan = measurement_plan(target.limits, grid)
            measuring = Measuring(target, plan, budget_s=budget_s, on_progress=on_progress, prompts=Prompts())
            measured = await measuring.run()
            return make_profile(target, measured, name, shape), measured


def make_profile(
    target: Target, measured: Measurements, name: str | None, shape: str | None
) -> PerformanceProfile:
    """Points in order of size, with what the target says of itself."""
    limits, facts = target.limits, target.facts
    link_source = "" if measured.transfers else "; KV link not measured"
    startup_source = "" if facts.startup_s is not None else "; start-up not measured"
    return PerformanceProfile(
        name=name or _slug(f"{facts.model}-{shape or ''}-{facts.accelerator}"),
        source=facts.source + link_source + startup_source,
        model=facts.model,
        accelerator=facts.accelerator,
        gpus_per_worker=facts.gpus_per_worker,
        kv_capacity_tokens=limits.kv_capacity_tokens,
        block_size_tokens=limits.block_size_tokens,
        kv_bytes_per_token=limits.kv_bytes_per_token,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        prefill=tuple(sorted(measured.prefill, key=lambda point: point.prompt_tokens)),
        decode=tuple(sorted(measured.decode, key=lambda point: (point.num_decoding, point.kv_tokens))),
        link=fit_link(measured.transfers),
        startup_s=facts.startup_s or _DEFAULT_STARTUP_S,
    )


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", text.lower()).strip("-")


@contextlib.contextmanager
def _progress(budget_s: float) -> Iterator[OnProgress]:
    """A bar with the time left on a terminal, else a line now and then."""
    console = messages()
    started_s = time.monotonic()
    if not console.is_terminal:
        yield lambda share, what: console.print(
            f"{time.monotonic() - started_s:6.1f} s  {100 * share:3.0f}%  {what}", markup=False
        )
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%  {task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with LiveProgress(*columns, console=console, transient=True) as live:
        task = live.add_task("", total=1.0, left="")

        def show(share: float, what: str) -> None:
            nonlocal started_s
            if share == 0:  # starting an engine says nothing about how long measuring takes
                started_s = time.monotonic()
            elapsed_s = time.monotonic() - started_s
            left_s = budget_s - elapsed_s
            if share > 0:
                left_s = min(left_s, elapsed_s / share * (1 - share))
            live.update(task, completed=share, description=what, left=f"at most {max(left_s, 0):.0f} s left")

        yield show


def _report(profile: PerformanceProfile, measured: Measurements, paths: list[Path]) -> None:
    fit = fit_linear(profile)
    step = fit.step_time
    prefill_off = statistics.median(abs(error) for error in fit.prefill_errors)
    decode_off = statistics.median(abs(error) for error in fit.decode_errors)
    console = output()
    console.print(
        f"{profile.name}: {len(profile.prefill)} prefill, {len(profile.decode)} decode and "
        f"{len(measured.transfers)} transfer points",
        markup=False,
    )
    console.print(
        f"prefill ms = {step.prefill_base_ms:.3g} + {step.prefill_ms_per_token:.3g} n + "
        f"{step.prefill_ms_per_token2:.3g} n^2   (median error {100 * prefill_off:.1f}%)\n"
        f"decode ms  = {step.decode_base_ms:.3g} + {step.decode_ms_per_seq:.3g} batch + "
        f"{step.decode_ms_per_kv_token:.3g} kv_tokens   (median error {100 * decode_off:.1f}%)",
        markup=False,
    )
    if measured.num_skipped:
        console.print(f"{measured.num_skipped} planned points left out: raise --max-minutes to have them")
    console.print("wrote " + ", ".join(str(path) for path in paths), markup=False, soft_wrap=True)
