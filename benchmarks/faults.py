"""The same faults on Baton and on two peers: the same engines, requests, moments and reference answers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.fault_baton import Baton
from benchmarks.fault_client import Ask, Fate, FaultClient
from benchmarks.fault_injections import KILL_ROWS
from benchmarks.fault_kills import KillResult, run_kill_row
from benchmarks.fault_leavers import CHECKS_S, LEAVE_ROWS, LeaveResult, run_leave_row
from benchmarks.fault_ray_llm import RayServeLlm
from benchmarks.fault_requests import NUM_REQUESTS, Requests, make_requests
from benchmarks.fault_systems import System, is_whole
from benchmarks.fault_vllm_router import VllmRouter
from benchmarks.table import Table

SYSTEMS = {"baton": Baton, "vllm-router": VllmRouter, "ray-serve-llm": RayServeLlm}
_WARM_REQUESTS = 8
_MAX_ERRORS_SHOWN = 3


_RowResult = TypeVar("_RowResult", KillResult, LeaveResult)


@dataclass(slots=True)
class SystemResult:
    """What one system did; rows that could not be run have a reason in their place."""

    name: str
    restarts_itself: bool
    kills: list[KillResult | str] = field(default_factory=list)
    leaves: list[LeaveResult | str] = field(default_factory=list)


def measure(
    model_dir: Path, logs: Path, names: Sequence[str], progress: Callable[[str], None]
) -> list[SystemResult]:
    """One system after the other, each started once; what cannot be run has a reason in its results.

    Args:
        logs: directory for the output of everything that is started.
        names: of ``SYSTEMS``.
    """
    requests = make_requests(model_dir, progress)
    return [_run_system(SYSTEMS[name], model_dir, logs / name, requests, progress) for name in names]


def _run_system(
    make: Callable[[Path, Path], Any],
    model_dir: Path,
    logs: Path,
    requests: Requests,
    progress: Callable[[str], None],
) -> SystemResult:
    shutil.rmtree(logs, ignore_errors=True)
    system = make(model_dir, logs)
    result = SystemResult(system.name, system.restarts_itself)
    progress(f"{system.name}: starting")
    try:
        with system:
            asyncio.run(_warm_up(system, requests))
            for leave_row in LEAVE_ROWS:
                what = f"{system.name}: clients hang up {leave_row.what}"
                result.leaves.append(
                    _run_row(system, run_leave_row(system, leave_row, requests), what, progress)
                )
            for row in KILL_ROWS:
                what = f"{system.name}: row {row.number}, {row.what}"
                result.kills.append(_run_row(system, run_kill_row(system, row, requests), what, progress))
            progress(f"{system.name}: stopping")
    except Exception as error:
        progress(f"{system.name}: {error!r}")
        missing = f"not run: {error}"
        result.leaves += [missing] * (len(LEAVE_ROWS) - len(result.leaves))
        result.kills += [missing] * (len(KILL_ROWS) - len(result.kills))
    return result


def _run_row(
    system: System,
    running: Coroutine[Any, Any, _RowResult],
    what: str,
    progress: Callable[[str], None],
) -> _RowResult | str:
    if not is_whole(system):
        running.close()
        return "not run: workers were missing since the row before"
    progress(what)
    try:
        result = asyncio.run(running)
    except Exception as error:
        progress(f"  {error!r}")
        return f"not run: {error!r}"
    progress(f"  {result}")
    return result


async def _warm_up(system: System, requests: Requests) -> None:
    """Every pair of workers has met, and answers as the plain engine does.

    Raises:
        RuntimeError: it does not.
    """
    async with FaultClient(system.url) as client:
        asks = [Ask(each.body, each.expected) for each in requests.probes[:_WARM_REQUESTS]]
        for outcome in await asyncio.gather(*(client.ask(ask) for ask in asks)):
            if outcome.fate is not Fate.RIGHT:
                raise RuntimeError(f"{system.name} does not answer rightly before any fault: {outcome.why}")


def tables(results: Sequence[SystemResult]) -> list[Table]:
    return [_running_table(results), _after_table(results), _leave_table(results)]


def _running_table(results: Sequence[SystemResult]) -> Table:
    headers = ["killed, system", "answered rightly", "wrong tokens", "failed", "hung", "with which error"]
    rows = []
    for index, row in enumerate(KILL_ROWS):
        for system in results:
            name = f"{row.number}: {row.what}; {system.name}"
            result = system.kills[index]
            if isinstance(result, str):
                rows.append((name, "-", "-", "-", "-", result))
                continue
            rows.append(
                (
                    name,
                    f"**{result.count(Fate.RIGHT)}**",
                    str(result.count(Fate.WRONG)),
                    str(result.count(Fate.FAILED)),
                    str(result.count(Fate.HUNG)),
                    _errors(result.errors),
                )
            )
    return Table(f"{NUM_REQUESTS} requests that were running when workers were killed", headers, rows)


def _after_table(results: Sequence[SystemResult]) -> Table:
    headers = [
        "killed, system",
        "new requests",
        "failed",
        "first right one after, s",
        "last failed one sent after, s",
        "with which error",
        "workers back after, s",
        "by itself",
        "KV blocks still held after 2 s, 10 s",
    ]
    rows = []
    for index, row in enumerate(KILL_ROWS):
        for system in results:
            name = f"{row.number}: {row.what}; {system.name}"
            result = system.kills[index]
            if isinstance(result, str):
                rows.append((name, *["-"] * (len(headers) - 1)))
                continue
            rows.append(
                (
                    name,
                    str(result.probes),
                    f"**{result.probes_failed}**",
                    _seconds(result.first_right_s, "never"),
                    f"{result.last_failed_s:.1f}" if result.probes_failed else "-",
                    _errors(result.probe_errors),
                    _seconds(result.whole_s, "never"),
                    "yes" if system.restarts_itself else "no",
                    ", ".join(map(str, result.held_after)),
                )
            )
    return Table("New requests, two a second from the kill until the workers were back", headers, rows)


def _leave_table(results: Sequence[SystemResult]) -> Table:
    headers = [
        "9: clients hang up, system",
        "clients",
        "KV blocks at most",
        *[f"after {check_s:g} s" for check_s in CHECKS_S],
        "nothing held after, s",
    ]
    rows = []
    for index, row in enumerate(LEAVE_ROWS):
        for system in results:
            result = system.leaves[index]
            name = f"{row.what}; {system.name}"
            if isinstance(result, str):
                rows.append((name, *["-"] * (len(headers) - 2), result))
                continue
            rows.append(
                (
                    name,
                    str(result.left),
                    str(result.held_most),
                    f"**{result.held_after[0]}**",
                    *map(str, result.held_after[1:]),
                    _seconds(result.free_s, f"over {CHECKS_S[-1]:g}"),
                )
            )
    return Table("Clients that hang up", headers, rows)


def _seconds(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.1f}"


def _errors(errors: Mapping[str, int]) -> str:
    """The commonest first, with their number."""
    ordered = sorted(errors.items(), key=lambda item: -item[1])
    shown = [f"{count} x {why}" for why, count in ordered[:_MAX_ERRORS_SHOWN]]
    return "; ".join(shown) + (" ..." if len(ordered) > _MAX_ERRORS_SHOWN else "") or "-"


def as_json(results: Sequence[SystemResult]) -> list[dict[str, Any]]:
    def plain(result: KillResult | LeaveResult | str) -> Any:
        if isinstance(result, str):
            return result
        fields = {key: value for key, value in asdict(result).items() if key != "row"}
        return {"what": result.row.what, **fields}

    return [
        {
            "system": result.name,
            "kills": [plain(each) for each in result.kills],
            "leaves": [plain(each) for each in result.leaves],
        }
        for result in results
    ]
