"""Workers on nodes of their own, and a relay in this process in front of them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from vllm.sampling_params import SamplingParams

from core.clock import MonotonicClock
from core.request import Path
from core.types import Role, Snapshot, WorkerLoad, WorkerReport
from engine.base import EngineDelta
from engine.vllm_codec import encode_options
from router.cluster_view import ClusterView
from router.policies import make_policy
from router.relay import Relay, RelayConfig
from router.relay_request import RelayRequest
from router.trace import RequestTrace
from router.worker_link import WorkerLink
from tests.faults.netns import Node
from tests.faults.worker_process import report_in
from tests.integration.server_process import ServerProcess

START_TIMEOUT_S = 90.0
_ids = itertools.count()


@dataclass
class Answer:
    """What the relay emitted for one request."""

    trace: RequestTrace
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    took_s: float = 0.0


class RelayedWorkers:
    """A relay as a router has it, with the defaults of Baton's configuration."""

    def __init__(self, reports: Mapping[Role, WorkerReport]) -> None:
        self.clock = MonotonicClock()
        self.loads: dict[Role, WorkerLoad] = {}
        self.view = ClusterView(self._link, self.clock)
        self._roles = {report.worker_id: role for role, report in reports.items()}
        config = RelayConfig(prefill_timeout_s=60.0, stall_timeout_s=120.0)
        self.relay = Relay(self.view, make_policy("least_load", random_seed=0), config, self.clock)
        workers = tuple(dataclasses.replace(report, role=role) for role, report in reports.items())
        self.view.update(Snapshot(incarnation="r", epoch=1, workers=workers))

    def _link(self, report: WorkerReport, on_load: Any) -> WorkerLink:
        def noted(load: WorkerLoad) -> None:
            self.loads[self._roles[report.worker_id]] = load
            on_load(load)

        return WorkerLink(report.address, "relay", noted)  # the worker has a link of its own

    async def wait_up(self) -> None:
        for member in self.view.members():
            assert await member.link.wait_up(10.0)

    async def close(self) -> None:
        for member in self.view.members():
            await member.close()

    async def ask(
        self,
        prompt: list[int],
        num_tokens: int,
        path: Path = Path.REMOTE_EARLY,
        cache_salt: str | None = None,
    ) -> Answer:
        """Relays one greedy request."""
        request_id, since_s = f"q{next(_ids)}", self.clock.now_s()
        trace = RequestTrace(
            request_id=request_id,
            model="tiny",
            adapter="",
            tenant="",
            prompt_tokens=len(prompt),
            received_at_s=since_s,
            path=path,
        )
        answer = Answer(trace)

        def collect(delta: EngineDelta) -> None:
            answer.token_ids += delta.token_ids
            answer.finish_reason = delta.finish_reason

        request = RelayRequest(
            request_id=request_id,
            model="tiny",
            adapter="",
            tenant="",
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
            options=encode_options(cache_salt=cache_salt),
            path=path,
        )
        await self.relay.run(request, trace, collect)
        answer.took_s = self.clock.now_s() - since_s
        return answer

    async def alone(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What one engine answers by itself, computed from nothing."""
        answer = await self.ask(prompt, num_tokens, Path.LOCAL, cache_salt=f"alone {next(_ids)}")
        return answer.token_ids

    async def wait_empty(self, within_s: float) -> None:
        """Until no worker holds KV blocks or requests, as they say themselves."""
        async with asyncio.timeout(within_s):
            while any(map(_holds_something, self.loads.values())):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


def _holds_something(load: WorkerLoad) -> bool:
    return bool(load.kv_used_blocks or load.num_pinned or load.num_running or load.num_waiting)


@asynccontextmanager
async def relayed_workers(
    nodes: Mapping[Role, Node],
    model_path: FilePath,
    run_dir: FilePath,
    environment: Mapping[str, str],
    *,
    lease_s: int,
    **engine_args: Any,
) -> AsyncIterator[RelayedWorkers]:
    """One worker on each node; ``engine_args`` go on top of those of ``tests.integration.engine_process``."""
    async with AsyncExitStack() as undo:
        processes: dict[Role, ServerProcess] = {}
        for role, node in nodes.items():
            arguments = (role.value, str(model_path), node.data_host, str(lease_s), json.dumps(engine_args))
            process = ServerProcess(
                f"{role} worker",
                node.command(sys.executable, "-m", "tests.faults.worker_process", *arguments),
                environment,
                run_dir / f"{role}.log",
            )
            undo.push_async_callback(asyncio.to_thread, process.stop, grace_s=10)
            processes[role] = process
        reports = {}
        for role, process in processes.items():
            report = await asyncio.to_thread(_wait_for_report, process)
            port = report.address.rpartition(":")[2]
            reports[role] = dataclasses.replace(report, address=f"{nodes[role].control_host}:{port}")
        workers = RelayedWorkers(reports)
        undo.push_async_callback(workers.close)
        await workers.wait_up()
        yield workers


def _wait_for_report(process: ServerProcess) -> WorkerReport:
    process.wait_until(lambda: report_in(process.log_tail()) is not None, START_TIMEOUT_S)
    report = report_in(process.log_tail())
    assert report is not None
    return report
