"""An OpenAI server as the tests see it: requests, streams, and Baton's own view of them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

REQUEST_TIMEOUT_S = 60.0
Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A complete answer; of a stream, its events."""

    status: int
    body: Any
    events: tuple[Any, ...] = ()
    done: bool = False
    """The stream ended with [DONE]."""

    @property
    def id(self) -> str:
        return str((self.events[0] if self.events else self.body)["id"])


@dataclass
class Served:
    """One server."""

    url: str
    model: str
    _client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self._client = httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S)

    def close(self) -> None:
        self._client.close()

    def get(self, path: str) -> Any:
        return self._client.get(path).raise_for_status().json()

    def post(self, path: str, body: Body) -> Answer:
        """Sends ``body`` with the model's name filled in; streams if it says so."""
        body = {"model": self.model, **body}
        if not body.get("stream"):
            response = self._client.post(path, json=body)
            return Answer(response.status_code, response.json())
        with self._client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                return Answer(response.status_code, json.loads(response.read()))
            return _streamed(list(response.iter_lines()))

    def post_raw(self, path: str, content: bytes, content_type: str = "application/json") -> httpx.Response:
        return self._client.post(path, content=content, headers={"content-type": content_type})

    def request(self, method: str, path: str) -> httpx.Response:
        return self._client.request(method, path)

    async def post_all(self, path: str, bodies: Sequence[Body], *, at_once: int = 32) -> list[Answer]:
        """Sends all of them, ``at_once`` at a time; answers in the order of the bodies."""
        slots = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(base_url=self.url, timeout=REQUEST_TIMEOUT_S, limits=limits) as client:

            async def send(body: Body) -> Answer:
                async with slots:
                    return await self.send(client, path, body)

            return await asyncio.gather(*(send(body) for body in bodies))

    async def send(self, client: httpx.AsyncClient, path: str, body: Body) -> Answer:
        body = {"model": self.model, **body}
        if not body.get("stream"):
            response = await client.post(path, json=body)
            return Answer(response.status_code, response.json())
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                return Answer(response.status_code, json.loads(await response.aread()))
            return _streamed([line async for line in response.aiter_lines()])


_HELD = re.compile(
    r"^baton_worker_(kv_used_blocks|pinned_prompts|running_requests|waiting_requests)\{[^}]*\} (\S+)$",
    re.MULTILINE,
)


@dataclass
class ServedByBaton(Served):
    """The cluster: a server that also says what it did."""

    pid: int = 0
    """Of the process that started the cluster."""

    def trace(self, request_id: str) -> dict[str, Any]:
        """Of a finished request; the router notes it just after the client has the answer."""
        deadline_s = time.monotonic() + 5
        while True:
            response = self._client.get(f"/baton/requests/{request_id}")
            if response.status_code == 200:
                return dict(response.json())
            if time.monotonic() > deadline_s:
                raise LookupError(response.text)
            time.sleep(0.02)

    def workers(self) -> list[dict[str, Any]]:
        return list(self.get("/baton/status")["workers"])

    def busy_workers(self) -> list[str]:
        """Workers that hold KV blocks or requests, as they say themselves; what routers know is older."""
        busy = []
        for worker in self.workers():
            text = httpx.get(f"http://{worker['metrics_address']}/metrics").text
            held = {name: float(value) for name, value in _HELD.findall(text)}
            assert len(held) == 4, f"{worker['worker_id']} does not say what it holds"
            if any(held.values()):
                busy.append(f"{worker['role']} {worker['worker_id']}: {held}")
        return busy

    def wait_idle(self, within_s: float) -> None:
        """Until no worker holds anything.

        Raises:
            AssertionError: one still did after ``within_s``.
        """
        deadline_s = time.monotonic() + within_s
        while busy := self.busy_workers():
            assert time.monotonic() < deadline_s, f"after {within_s} s: {busy}"
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """Every process of the cluster but those that have ended."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]

    def metric(self, name: str) -> dict[str, float]:
        """An unlabelled metric of each process with an endpoint, by its address."""
        values = {}
        for group in self.get("/baton/prometheus-sd"):
            for target in group["targets"]:
                text = httpx.get(f"http://{target}/metrics").text
                found = re.search(rf"^{name} (.*)$", text, re.MULTILINE)
                if found is not None:
                    values[target] = float(found.group(1))
        return values


def _streamed(lines: Sequence[str]) -> Answer:
    """Server-sent events: ``data:`` lines, with ``event:`` lines that the data repeats."""
    data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
    done = bool(data) and data[-1] == "[DONE]"
    events = tuple(json.loads(item) for item in data if item != "[DONE]")
    return Answer(200, None, events, done)
