"""An idle worker of a running cluster, reached as a router reaches it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import httpx

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens, unpack_tokens
from core.errors import BatonError, ConfigError, StartupError, WorkerLost
from core.performance_profile import TransferPoint
from deploy.profiling.plan import WorkerLimits
from deploy.profiling.target import TargetFacts, greedy_params, next_request_id
from router.worker_link import WorkerLink

_ATTACH_S = 10.0
_HTTP_S = 5.0
_STARTUP_METRIC = re.compile(
    r'^baton_worker_startup_seconds\{[^}]*phase="total"[^}]*\} ([0-9.e+]+)$', re.MULTILINE
)
_LIMITS = ("num_kv_blocks", "block_size_tokens", "bytes_per_block", "max_num_seqs", "max_num_batched_tokens")


class ClusterTarget:
    """Runs prompts on one worker over gRPC.

    Args:
        link: to the worker that is measured.
        peer: to another worker that computes prompts for it to pull; None if there is none.
        timeout_s: longest wait for an answer or the next token.
    """

    def __init__(
        self,
        link: WorkerLink,
        peer: WorkerLink | None,
        limits: WorkerLimits,
        facts: TargetFacts,
        timeout_s: float,
    ) -> None:
        self._link = link
        self._peer = peer
        self._limits = limits
        self._facts = facts
        self._timeout_s = timeout_s
        self._params = greedy_params()

    @property
    def limits(self) -> WorkerLimits:
        return self._limits

    @property
    def facts(self) -> TargetFacts:
        return self._facts

    async def prefill(self, prompt: list[int]) -> float:
        reply = await self._link.prefill(self._message(prompt, 1), keep_kv=False, timeout_s=self._timeout_s)
        return float(reply.delta.prefill_s)

    async def decode(self, prompt: list[int], max_tokens: int) -> AsyncGenerator[int, None]:
        request = worker_pb2.GenerateRequest(request=self._message(prompt, max_tokens))
        async with contextlib.aclosing(self._deltas(request)) as deltas:
            async for delta in deltas:
                yield len(unpack_tokens(delta.token_ids))

    async def transfer(self, prompt: list[int]) -> TransferPoint | None:
        if self._peer is None:
            return None
        prefill = self._message(prompt, 1)
        reply = await self._peer.prefill(prefill, keep_kv=True, timeout_s=self._timeout_s)
        if not reply.HasField("kv_handle"):
            return None
        request = worker_pb2.GenerateRequest(request=self._message(prompt, 1), kv_handle=reply.kv_handle)
        report = worker_pb2.Transfer()
        async with contextlib.aclosing(self._deltas(request)) as deltas:
            async for delta in deltas:
                report = delta.transfer
        if report.outcome != worker_pb2.Transfer.PULLED or not report.pull_s:
            await self._peer.release([prefill.request_id])
            return None
        return TransferPoint(num_bytes=report.num_bytes, seconds=report.pull_s)

    async def _deltas(self, request: worker_pb2.GenerateRequest) -> AsyncGenerator[worker_pb2.Delta, None]:
        """Deltas up to the last one; closing it early aborts the request on the worker."""
        received: asyncio.Queue[worker_pb2.Delta] = asyncio.Queue()
        request_id = request.request.request_id
        ended = False
        try:
            await self._link.generate(request, received.put_nowait)
            while not ended:
                try:
                    delta = await asyncio.wait_for(received.get(), self._timeout_s)
                except TimeoutError:
                    raise WorkerLost(f"{self._link.address}: no token for {self._timeout_s:.0f} s") from None
                if delta.HasField("failure"):
                    raise WorkerLost(delta.failure.message)
                ended = bool(delta.finish_reason)
                yield delta
        finally:
            if ended:
                self._link.forget(request_id)
            else:
                await self._link.abort(request_id)

    def _message(self, prompt: list[int], max_tokens: int) -> worker_pb2.EngineRequest:
        return worker_pb2.EngineRequest(
            request_id=next_request_id(),
            model=self._facts.model,
            prompt_token_ids=pack_tokens(prompt),
            max_tokens=max_tokens,
            sampling_params=self._params,
        )


@contextlib.asynccontextmanager
async def running_worker(
    url: str, shape: str | None, accelerator: str | None, timeout_s: float
) -> AsyncIterator[ClusterTarget]:
    """Connects to an idle worker of the cluster behind ``url``, and to a second one if there is one.

    Raises:
        ConfigError: there is no idle worker of that shape.
        StartupError: router or worker do not answer.
    """
    from deploy.cluster import fetch_status

    workers = await asyncio.to_thread(lambda: fetch_status(url)["workers"])
    worker, peer = pick_workers(workers, shape)
    limits = worker_limits(worker, await _max_model_len(url, worker["model"]))
    facts = TargetFacts(
        model=worker["model"],
        accelerator=accelerator or worker.get("accelerator") or "unknown",
        gpus_per_worker=worker.get("gpus_per_worker", 0 if accelerator == "CPU" else 1),
        source=f"measured by baton profile on worker {worker['worker_id']} of a running cluster",
        startup_s=await _startup_s(worker["metrics_address"]),
    )
    async with contextlib.AsyncExitStack() as stack:
        link = await stack.enter_async_context(_connect(worker["address"]))
        peer_link = await stack.enter_async_context(_connect(peer["address"])) if peer else None
        yield ClusterTarget(link, peer_link, limits, facts, timeout_s)


def pick_workers(
    workers: Sequence[Mapping[str, Any]], shape: str | None
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The worker to measure and one it can pull KV from: idle, of one shape, decode workers first.

    Args:
        workers: as the router's /baton/status gives them.

    Raises:
        ConfigError: there is no idle worker of that shape.
    """
    ready = [worker for worker in workers if worker["state"] == "ready"]
    shapes = sorted({worker["shape"] for worker in ready})
    if shape is None and len(shapes) > 1:
        raise ConfigError(f"--shape: name one of the shapes: {', '.join(shapes)}")
    if not ready:
        raise ConfigError("no worker is ready; wait until the cluster is up, or use --fresh")
    if shape is not None and shape not in shapes:
        raise ConfigError(f"--shape: no worker of shape {shape!r} is ready; there are: {', '.join(shapes)}")
    idle = [
        worker
        for worker in ready
        if shape in (None, worker["shape"]) and not worker["num_requests"] and not worker["num_pinned"]
    ]
    if not idle:
        raise ConfigError("every worker is busy; measure while no requests come in, or use --fresh")
    idle.sort(key=lambda worker: (worker["role"] != "decode", worker["worker_id"]))
    others = [worker for worker in idle[1:] if worker["role"] != idle[0]["role"]] or idle[1:]
    return idle[0], next(iter(others), None)


def worker_limits(worker: Mapping[str, Any], max_model_len: int) -> WorkerLimits:
    """
    Raises:
        ConfigError: the router does not give all of the worker's limits.
    """
    missing = [name for name in _LIMITS if not worker.get(name)]
    if missing:
        raise ConfigError(
            f"the router does not give {', '.join(missing)} of its workers: update it, or use --fresh"
        )
    return WorkerLimits(
        max_model_len=max_model_len,
        num_kv_blocks=worker["num_kv_blocks"],
        block_size_tokens=worker["block_size_tokens"],
        kv_bytes_per_token=worker["bytes_per_block"] // worker["block_size_tokens"],
        max_num_seqs=worker["max_num_seqs"],
        max_num_batched_tokens=worker["max_num_batched_tokens"],
    )


async def _max_model_len(url: str, model: str) -> int:
    try:
        async with httpx.AsyncClient(timeout=_HTTP_S) as client:
            cards = (await client.get(f"{url}/v1/models")).raise_for_status().json()["data"]
        return next(int(card["max_model_len"]) for card in cards if card["id"] == model)
    except (httpx.HTTPError, ValueError, KeyError, StopIteration) as error:
        raise StartupError(f"{url}/v1/models does not tell the context of {model!r}: {error!r}") from error


async def _startup_s(metrics_address: str) -> float | None:
    """What the worker says its start took, None if it does not."""
    with contextlib.suppress(httpx.HTTPError):
        async with httpx.AsyncClient(timeout=_HTTP_S) as client:
            text = (await client.get(f"http://{metrics_address}/metrics")).text
        if found := _STARTUP_METRIC.search(text):
            return round(float(found[1]), 1)
    return None


@contextlib.asynccontextmanager
async def _connect(address: str) -> AsyncIterator[WorkerLink]:
    link = WorkerLink(address, f"profile-{os.urandom(4).hex()}", lambda load: None)
    try:
        if not await link.wait_up(_ATTACH_S):
            raise StartupError(f"worker {address} cannot be reached from here within {_ATTACH_S:.0f} s")
        yield link
    finally:
        with contextlib.suppress(BatonError):
            await link.close()
