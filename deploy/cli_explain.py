"""``baton explain``: why a request went where it went, or would go."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.errors import ConfigError, StartupError
from deploy.cli_targets import url_of

if TYPE_CHECKING:
    from rich.table import Table

_ASK_TIMES = 24
"""Each router replica knows its own requests only, and each new connection may meet another replica."""
_TIMEOUT_S = 10.0


def explain(
    request_id: Annotated[
        str | None,
        typer.Argument(help="Id of a finished request, as its answer gave it.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Decide for this prompt now; nothing is sent.", show_default=False)
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Port, URL or configuration file of the cluster.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole answer as JSON.")] = False,
) -> None:
    """Show a routing decision: every worker with what was known and predicted of it, and its score.

    Of a finished request, the workers are shown if it was sent with the header `X-Baton-Explain: 1`.
    """
    from deploy.cli_output import output

    if (request_id is None) == (prompt is None):
        raise ConfigError("give the id of a request, or --prompt")
    url = url_of(cluster)
    if prompt is not None:
        answer = _post(f"{url}/baton/explain", {"prompt": prompt})
        explanations = [answer]
    else:
        answer = _find(f"{url}/baton/requests/{request_id}")
        explanations = answer["explanations"]
    if as_json:
        typer.echo(json.dumps(answer, indent=1))
        return
    if not explanations:
        for decision in answer["decisions"]:
            output().print(_decided(decision), soft_wrap=True)
        output().print(
            "Send a request with the header X-Baton-Explain: 1 to see what its decision was made from."
        )
    for explanation in explanations:
        output().print(_decided(explanation["decision"]), soft_wrap=True)
        output().print(candidates_table(explanation))


def candidates_table(explanation: dict[str, Any]) -> Table:
    """One line a worker, the best of each role first; times in milliseconds."""
    from rich.table import Table

    decision = explanation["decision"]
    chosen = {decision["decode_worker"], decision["prefill_worker"]}
    table = Table(title=f"workers for {explanation['prompt_tokens']} prompt tokens", title_justify="left")
    for heading in ("worker", "role"):
        table.add_column(heading, overflow="fold")
    for heading in ("score", "cached", "queue ms", "prefill ms", "step ms", "requests", "waiting", "KV free"):
        table.add_column(heading, justify="right")
    role = None
    for row in explanation["candidates"]:
        if role not in (None, row["role"]):
            table.add_section()
        role = row["role"]
        score = "-" if row["score"] is None else f"{row['score']:.4g}"
        table.add_row(
            row["worker_id"],
            role,
            score,
            str(row["cached_tokens"]),
            *(_ms(row.get(key)) for key in ("queue_s", "prefill_s", "decode_step_s")),
            *(str(row[key]) for key in ("num_requests", "waiting_prefill_tokens", "kv_free_tokens")),
            style="bold green" if row["worker_id"] in chosen else None,
        )
    return table


def _decided(decision: dict[str, Any]) -> str:
    prefill = decision["prefill_worker"] or "the decode worker"
    decode = decision["decode_worker"] or "nobody"
    predicted = ", ".join(
        f"{name} {_ms(decision[key])} ms"
        for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
        if decision[key] is not None
    )
    return f"{decision['reason']}: prefill by {prefill}, decode by {decode}" + (
        f"; predicted {predicted}" if predicted else ""
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """
    Raises:
        StartupError: nothing that answers like a router is there, or it refuses.
    """
    import httpx

    try:
        response = httpx.post(url, json=body, timeout=_TIMEOUT_S)
        answer = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise StartupError(f"no Baton router answers at {url}: {error}") from error
    if response.is_error:
        raise StartupError(f"the router refuses: {answer}")
    return dict(answer)


def _find(url: str) -> dict[str, Any]:
    """
    Raises:
        StartupError: nothing that answers like a router is there, or no router knows the request.
    """
    import httpx

    try:
        for _ in range(_ASK_TIMES):
            response = httpx.get(url, timeout=_TIMEOUT_S)
            if response.status_code != httpx.codes.NOT_FOUND:
                return dict(response.raise_for_status().json())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise StartupError(f"no Baton router answers at {url}: {error}") from error
    raise StartupError(f"no router has this request in its log of the last 1000: {url.rpartition('/')[2]}")
