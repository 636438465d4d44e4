"""What one router process can carry, and what its transport costs: frames against streams.

The router's whole application runs as a plain process (no Ray, no HAProxy) between a load generator
and two workers whose engines are mocks: real HTTP, real tokenization, real relay, real gRPC, real
detokenization; only the model is missing. Costs are CPU time of each process, read from the system
before and after a job, so the load generator may share the cores without being counted.

Two jobs separate what a request costs from what a token costs: one of long answers, one of the
shortest answers that still cross from a prefill to a decode worker.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import LoadGenerator
from benchmarks.model import NAME, PromptMaker
from benchmarks.router_process import LINKS
from benchmarks.servers import free_port
from benchmarks.table import Table, median
from deploy.environment import router_environment

STREAMS = (64, 128, 256)
ROUNDS, QUICK_ROUNDS = 3, 1
STEP_MS = 20.0
PROMPT_TOKENS, LONG_TOKENS, SHORT_TOKENS = 200, 256, 2
_SHORT_REQUESTS_A_STREAM = 4
ROUTER, PREFILL, DECODE = "router", "prefill worker", "decode worker"


@dataclass(frozen=True, slots=True)
class _Process:
    """A started module and what it said when it was ready."""

    popen: subprocess.Popen[str]
    said: str

    def cpu_s(self) -> float:
        times = psutil.Process(self.popen.pid).cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def _module(*arguments: str) -> Iterator[_Process]:
    """Runs a module until the block is left; yields once it has printed a line."""
    popen = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(router_environment()) | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    try:
        assert popen.stdout is not None
        said = popen.stdout.readline().strip()
        if not said:
            raise RuntimeError(f"{arguments[0]} ended while starting")
        yield _Process(popen, said)
    finally:
        popen.kill()
        popen.wait()


@contextlib.contextmanager
def _routers(model_dir: Path) -> Iterator[tuple[dict[str, _Process], dict[str, tuple[_Process, int]]]]:
    """Two workers and, before the same two, one router per transport with its port."""
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                _module("benchmarks.mock_worker_process", name.split()[0], "--step-ms", str(STEP_MS))
            )
            for name in (PREFILL, DECODE)
        }
        routers = {}
        for transport in LINKS:
            port = free_port()
            router = _module(
                "benchmarks.router_process",
                *("--transport", transport, "--port", str(port)),
                *("--model-path", str(model_dir), "--model-name", NAME),
                *("--prefill", workers[PREFILL].said, "--decode", workers[DECODE].said),
            )
            routers[transport] = (stack.enter_context(router), port)
        yield workers, routers


def measure(
    load: LoadGenerator,
    prompts: PromptMaker,
    model_dir: Path,
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """CPU seconds per token and per request, by transport, streams and process."""
    samples: dict[str, dict[int, list[dict[str, Any]]]] = {t: {n: [] for n in STREAMS} for t in LINKS}
    with _routers(model_dir) as (workers, routers):
        for round_ in range(rounds + 1):
            for streams in STREAMS if round_ else STREAMS[:1]:
                for transport, (router, port) in routers.items():
                    progress(f"router: round {round_} of {rounds}, {streams} streams, {transport}")
                    processes = {ROUTER: router, **workers}
                    sample = _sample(load, prompts, port, streams, processes)
                    if round_:
                        samples[transport][streams].append(sample)
    return {
        transport: {str(streams): _median_of(runs) for streams, runs in by_streams.items()}
        for transport, by_streams in samples.items()
    }


def _sample(
    load: LoadGenerator, prompts: PromptMaker, port: int, streams: int, processes: Mapping[str, _Process]
) -> dict[str, Any]:
    short = _job(load, prompts, port, streams, _SHORT_REQUESTS_A_STREAM, SHORT_TOKENS, processes)
    long = _job(load, prompts, port, streams, 1, LONG_TOKENS, processes)
    token_s = {
        name: (long.cpu_s[name] - short.cpu_s[name]) / (LONG_TOKENS - SHORT_TOKENS) for name in processes
    }
    return {
        "token_cpu_s": token_s,
        "request_cpu_s": {name: short.cpu_s[name] - SHORT_TOKENS * token_s[name] for name in processes},
        "tokens_per_s": LONG_TOKENS * long.requests_per_s,
        "requests_per_s": short.requests_per_s,
    }


@dataclass(frozen=True, slots=True)
class _Job:
    cpu_s: Mapping[str, float]
    """Per request, by process."""
    requests_per_s: float


def _job(
    load: LoadGenerator,
    prompts: PromptMaker,
    port: int,
    streams: int,
    requests_a_stream: int,
    max_tokens: int,
    processes: Mapping[str, _Process],
) -> _Job:
    num_requests = streams * requests_a_stream
    bodies = [prompts.chat(PROMPT_TOKENS, max_tokens=max_tokens) for _ in range(num_requests)]
    before = {name: process.cpu_s() for name, process in processes.items()}
    answers = load.run(port, bodies, concurrency=streams, keep_times=False)
    cpu_s = {name: (process.cpu_s() - before[name]) / num_requests for name, process in processes.items()}
    span_s = max(a.end_s for a in answers) - min(a.sent_s for a in answers)
    return _Job(cpu_s, num_requests / span_s)


def _median_of(samples: Sequence[Any]) -> Any:
    """Field by field."""
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: _median_of([sample[key] for sample in samples]) for key in first}
    return median(samples)


def tables(result: Mapping[str, Any]) -> list[Table]:
    ceiling = [
        [
            streams,
            f"{1e6 * run['token_cpu_s'][ROUTER]:.1f}",
            f"**{1 / run['token_cpu_s'][ROUTER]:,.0f}**",
            f"{1e3 * run['request_cpu_s'][ROUTER]:.2f}",
            f"**{1 / run['request_cpu_s'][ROUTER]:,.0f}**",
            f"{run['tokens_per_s']:,.0f}",
        ]
        for streams, run in result["frames"].items()
    ]
    transport = [
        [
            streams,
            *(
                f"{1e6 * result[name][streams]['token_cpu_s'][process]:.1f}"
                for process in (ROUTER, DECODE)
                for name in LINKS
            ),
            *(f"{1e3 * _request_s(result[name][streams]):.2f}" for name in LINKS),
        ]
        for streams in result["frames"]
    ]
    return [
        Table(
            "The router's ceiling (frames), CPU time of the router process",
            ["streams", "µs a token", "tokens/s a core", "ms a request", "requests/s a core", "tokens/s run"],
            ceiling,
        ),
        Table(
            "Frames against streams: CPU µs a token, and CPU ms a request on router and workers together",
            [
                "streams", "router: frames", "router: streams", "decode worker: frames",
                "decode worker: streams", "request: frames", "request: streams",
            ],
            transport,
        ),
    ]  # fmt: skip


def _request_s(run: Mapping[str, Any]) -> float:
    return sum(run["request_cpu_s"].values())
