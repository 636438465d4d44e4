"""``baton planner``: what the planner has decided, why, and how it does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.errors import ConfigError, StartupError
from deploy.cli_targets import url_of

if TYPE_CHECKING:
    from rich.table import Table

_TIMEOUT_S = 10.0
_MAX_LAST = 1000
_OFF = "the planner is off: planner.mode of the configuration"

planner_app = typer.Typer(
    no_args_is_help=True,
    help="Show what the planner decides, and why.",
    epilog="""Examples:

baton planner status

baton planner history --moves""",
)

Target = Annotated[
    str | None, typer.Argument(metavar="[PORT|URL|CONFIG]", help="Which cluster.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what the planner answers.")]


@planner_app.command(
    epilog="""Examples:

baton planner history                    the last 20 decisions

baton planner history --moves --last 5   only those that change something

baton planner history --number 128       one decision with all it was weighed against"""
)
def history(
    target: Target = None,
    last: Annotated[int, typer.Option(min=1, max=_MAX_LAST, help="How many decisions.")] = 20,
    number: Annotated[int | None, typer.Option(help="One decision, whole.", show_default=False)] = None,
    moves: Annotated[bool, typer.Option("--moves", help="Only those that change something.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show decisions, the newest last: when, what, why, and from which figures.

    Of those that change something the last 1000 are remembered, and the last 1000 of all.
    """
    from deploy.cli_output import output
    from deploy.cli_planner_tables import alternatives_table, changes, history_table, inputs_table

    query = f"last={last}&moves={str(moves).lower()}" + ("" if number is None else f"&number={number}")
    answer = _ask(target, query)
    if as_json:
        typer.echo(json.dumps(answer, indent=1))
    elif answer["mode"] == "off":
        output().print(_OFF)
    elif number is None:
        output().print(history_table(answer["decisions"], answer["mode"]))
    else:
        (decision,) = answer["decisions"]
        output().print(history_table([decision], answer["mode"]))
        for line in changes(decision):
            output().print(line, markup=False, soft_wrap=True)
        output().print(inputs_table(decision), alternatives_table(decision))


@planner_app.command(
    epilog="""Examples:

baton planner status

baton planner status http://head:8000 --json"""
)
def status(target: Target = None, as_json: AsJson = False) -> None:
    """Show how the planner does: its mode, its last decision, what it has learned of the workers."""
    from deploy.cli_output import output
    from deploy.cli_planner_tables import factors_table, inputs_table, status_lines

    answer = _ask(target, "last=1")
    if as_json:
        typer.echo(json.dumps(answer, indent=1))
        return
    if answer["mode"] == "off":
        output().print(_OFF)
        return
    for line in status_lines(answer):
        output().print(line, markup=False, soft_wrap=True)
    tables: list[Table] = [inputs_table(decision) for decision in answer["decisions"] if decision["inputs"]]
    if answer["step_time_factors"]:
        tables.append(factors_table(answer["step_time_factors"]))
    for table in tables:
        output().print(table)


def _ask(target: str | None, query: str) -> dict[str, Any]:
    """
    Raises:
        ConfigError: there is no such decision.
        StartupError: nothing that answers like a router is there, or the planner does not answer it.
    """
    import httpx

    url = f"{url_of(target)}/baton/planner"
    try:
        response = httpx.get(f"{url}?{query}", timeout=_TIMEOUT_S)
        answer = response.json()
        if response.status_code == httpx.codes.NOT_FOUND and "planner" in str(answer.get("detail")):
            raise ConfigError(answer["detail"])
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE and "detail" in answer:
            raise StartupError(answer["detail"])
        return dict(response.raise_for_status().json())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise StartupError(f"no Baton router answers at {url}: {error}") from error
