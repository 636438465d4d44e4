"""`baton profile`: measures one worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.errors import ConfigError


def profile(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[PORT|URL|CONFIG]",
            help="The running cluster to measure a worker of; with --fresh, a configuration file.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--out", "-o", help="Profile to write (JSON).")] = Path(
        "profile.json"
    ),
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw points and fit here: PNG, SVG or PDF.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start an engine for the purpose instead, and time its start.")
    ] = False,
    shape: Annotated[str | None, typer.Option("--shape", help="Which workers, if there are several.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the profile.")] = None,
    accelerator: Annotated[
        str | None, typer.Option("--accelerator", help="What to call the hardware.")
    ] = None,
    max_minutes: Annotated[
        float, typer.Option("--max-minutes", help="Time to measure in; with less, fewer points.")
    ] = 15.0,
) -> None:
    """Measure how long a worker's steps and KV transfers take; simulations compute with it.

    The worker should be idle: what else it runs is measured with it."""
    from deploy.cli_targets import url_of
    from deploy.profiling.command import run_profile

    if fresh and target is None:
        raise ConfigError("--fresh starts an engine from a configuration file: name one")
    run_profile(
        str(target) if fresh else url_of(target),
        output,
        fresh=fresh,
        shape=shape,
        plot=plot,
        name=name,
        accelerator=accelerator,
        max_minutes=max_minutes,
    )
