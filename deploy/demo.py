"""The demo: two prefill and two decode workers on a CPU, who does what, and a worker that changes roles."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from core.errors import BatonError, StartupError
from deploy import tiny_model
from deploy.cli_output import output, phase_lines
from deploy.cli_planner_tables import alternatives_table, inputs_table
from deploy.cli_tables import workers_table
from deploy.cluster import fetch_status
from deploy.config import load_config
from deploy.demo_burst import RATE_RPS, Burst, send_burst
from deploy.demo_tables import Trace, burst_lines, legs_table, requests_table
from deploy.foreground import running_cluster, wait_for_signal
from deploy.settings import LOOPBACK
from kv_transfer.peer import free_port

if TYPE_CHECKING:
    from openai import OpenAI

CONFIG = Path(__file__).parent / "configs" / "demo-cpu.yaml"
_MODEL_VARIABLE = "BATON_DEMO_MODEL"
_MAX_TOKENS = 32
_REST_S = 5.0
_SENTENCE = "One worker reads the prompt, another one writes the answer. "


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A request of the demo."""

    label: str
    num_sentences: int
    stream: bool = False
    options: dict[str, Any] = field(default_factory=dict)


SAMPLES = (
    Sample(label="chat", num_sentences=1),
    Sample(label="chat, streamed", num_sentences=1, stream=True),
    Sample(label="chat", num_sentences=10),
    Sample(label="chat, streamed", num_sentences=10, stream=True),
    Sample(label="chat", num_sentences=60),
    Sample(label="chat, streamed", num_sentences=60, stream=True),
    Sample(label="penalty, streamed", num_sentences=10, stream=True, options={"presence_penalty": 0.5}),
    Sample(label="two answers", num_sentences=10, options={"n": 2, "temperature": 0.8}),
)


def run_demo(*, keep: bool) -> None:
    """Starts the cluster, sends the samples, prints what happened, ends the cluster.

    Args:
        keep: go on serving until SIGINT or SIGTERM.

    Raises:
        BatonError: the cluster did not start, or KV that should have crossed over NIXL did not.
        openai.OpenAIError: a request failed.
    """
    with phase_lines() as progress:
        if not os.environ.get(_MODEL_VARIABLE):
            progress("making a tiny model")
            os.environ[_MODEL_VARIABLE] = str(_cached_tiny_model())
            os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["BATON_PORT"] = str(free_port(LOOPBACK))
        config = load_config(CONFIG)
        with running_cluster(config, progress) as cluster:
            progress("sending requests")
            requests = _send_samples(cluster.url, config.models[0].name)
            _show(requests)
            _check(requests)
            progress(f"sending more prompts than two workers can prefill, {RATE_RPS:g} a second")
            _show_burst(asyncio.run(send_burst(cluster.url, config.models[0].name)), cluster.url)
            if keep:
                output().print(f"serving at {cluster.url}/v1 until Ctrl-C", soft_wrap=True)
                wait_for_signal(cluster)
        progress("stopped; no process is left")


def _send_samples(url: str, model: str) -> list[tuple[str, Trace]]:
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        requests = []
        for number, sample in enumerate(SAMPLES, start=1):
            response_id = _send(client, model, number, sample)
            trace = httpx.get(f"{url}/baton/requests/{response_id}").raise_for_status().json()
            requests.append((sample.label, trace))
        return requests


def _send(client: OpenAI, model: str, number: int, sample: Sample) -> str:
    # The number comes first, so that no two prompts share a prefix that a cache could hold.
    prompt = f"{number}. " + _SENTENCE * sample.num_sentences
    answer: Any = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=_MAX_TOKENS,
        stream=sample.stream,
        **{"temperature": 0, **sample.options},
    )
    if sample.stream:
        return [chunk.id for chunk in answer][-1]
    return answer.id


def _show(requests: Sequence[tuple[str, Trace]]) -> None:
    console = output()
    for table in (requests_table(requests), legs_table(requests, console.width)):
        console.print()
        console.print(table)


def _show_burst(burst: Burst, url: str) -> None:
    console = output()
    console.print()
    for line in burst_lines(burst):
        console.print(line, markup=False, soft_wrap=True)
    if burst.move is not None:
        console.print()
        console.print(inputs_table(burst.move), alternatives_table(burst.move))
    console.print()
    console.print(workers_table(_workers_at_rest(url)))


def _workers_at_rest(url: str) -> list[dict[str, Any]]:
    """The workers, once they report that the last request's KV is freed; as they are after a while."""
    deadline_s = time.monotonic() + _REST_S
    while True:
        workers = fetch_status(url)["workers"]
        if not any(worker["kv_used_blocks"] for worker in workers) or time.monotonic() > deadline_s:
            return workers
        time.sleep(0.1)


def _check(requests: Sequence[tuple[str, Trace]]) -> None:
    for number, (label, trace) in enumerate(requests, start=1):
        if trace["path"].startswith("remote") and not trace["kv_bytes"]:
            reason = trace["kv_reason"] or trace["kv_outcome"] or "no reason given"
            raise BatonError(f"request {number} ({label}): no KV crossed over NIXL ({reason})")


def _cached_tiny_model() -> Path:
    """The tiny model, made when it is not there or when the code that makes it has changed.

    Raises:
        StartupError: it cannot be made.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "baton"
    source = Path(tiny_model.__file__)
    directory = cache / f"tiny-model-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    # In a process of its own: torch would stay in this one's memory.
    code = "import sys, pathlib, deploy.tiny_model as m; m.make_tiny_model(pathlib.Path(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-P", "-c", code, str(directory)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        lines = made.stderr.strip().splitlines() or [f"exit status {made.returncode}"]
        raise StartupError(f"cannot make the tiny model in {directory}: {lines[-1]}")
    return directory
