"""The load generator: a process of its own that keeps clients busy and notes when bytes came.

While a job runs it stores bytes and times only; what they mean is worked out once the job is over, so
that measuring takes as little as it can from the cores that are being measured.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.answers import Answer, RawAnswer

_LAST_CHUNK = b"0\r\n\r\n"
CHAT = "/v1/chat/completions"


class LoadGenerator:
    """The parent's side: starts the process, hands it jobs, ends it."""

    def __enter__(self) -> LoadGenerator:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(
        self,
        port: int,
        bodies: Sequence[dict[str, Any]],
        *,
        concurrency: int = 1,
        path: str = CHAT,
        keep_times: bool = True,
    ) -> list[Answer]:
        """Sends the bodies from ``concurrency`` clients, each one request at a time.

        Args:
            bodies: JSON of POST requests; an empty one makes a GET.
            keep_times: note the arrival of every token. Off, only requests are timed, which is what a
                thousand streams leave the time for.

        Raises:
            RuntimeError: a request failed.
        """
        job = {
            "port": port, "path": path, "concurrency": concurrency, "keep_times": keep_times,
            "bodies": list(bodies),
        }  # fmt: skip
        return self._run(job, path)

    def replay(
        self, port: int, bodies: Sequence[dict[str, Any]], send_at_s: Sequence[float], *, path: str = CHAT
    ) -> list[Answer]:
        """Sends each body at its time, seconds from now, whatever became of the ones before it.

        Returns:
            Answers in the order of ``bodies``.

        Raises:
            RuntimeError: a request failed.
        """
        job = {"port": port, "path": path, "bodies": list(bodies), "send_at_s": list(send_at_s)}
        return self._run({**job, "keep_times": True}, path)

    def _run(self, job: dict[str, Any], path: str) -> list[Answer]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(job).encode() + b"\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError("the load generator died")
        answers = [Answer(**fields) for fields in json.loads(line)]
        failed = [answer.status for answer in answers if answer.status != 200]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(answers)} requests to {path} failed: {failed[0]}")
        return answers


# The process's own side.


class _Connection(asyncio.Protocol):
    """One keep-alive connection: a request out, the answer's bytes and their times in."""

    def __init__(self, keep_times: bool) -> None:
        self._keep_times = keep_times
        self._chunks: list[tuple[float, bytes]] = []
        self._tail = b""
        self._length_left: int | None = None
        self._complete: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    async def request(self, message: bytes) -> RawAnswer:
        self._chunks, self._length_left = [], None
        self._complete = asyncio.get_running_loop().create_future()
        sent_s = time.monotonic()
        self.transport.write(message)  # type: ignore[attr-defined]
        await self._complete
        return RawAnswer(sent_s, self._chunks)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        chunks = self._chunks
        if not chunks:
            self._length_left, self._tail = _length(data), b""
        if self._keep_times or len(chunks) < 2:
            chunks.append((now_s, data))
        else:
            chunks[1] = (now_s, b"")
        if self._length_left is not None:
            self._length_left -= len(data)
            complete = self._length_left <= 0
        else:
            self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
            complete = self._tail == _LAST_CHUNK
        if complete and self._complete is not None and not self._complete.done():
            self._complete.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._complete is not None and not self._complete.done():
            self._complete.set_exception(exc or ConnectionError("the server closed the connection"))


def _length(head: bytes) -> int | None:
    """Bytes of the whole answer with its header; None if its end is marked by an empty chunk."""
    header, _, _ = head.partition(b"\r\n\r\n")
    for line in header.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(header) + 4 + int(line.split(b":")[1])
    return None


async def _replay(job: dict[str, Any]) -> list[Answer]:
    start_s = time.monotonic()

    async def send(body: dict[str, Any], at_s: float) -> RawAnswer:
        message = _message(job["path"], body)
        await asyncio.sleep(start_s + at_s - time.monotonic())
        connection = await _connect(job)
        answer = await connection.request(message)
        connection.transport.close()
        return answer

    bodies = zip(job["bodies"], job["send_at_s"], strict=True)
    raw = await asyncio.gather(*(send(body, at_s) for body, at_s in bodies))
    return [answer.read() for answer in raw]


async def _connect(job: dict[str, Any]) -> _Connection:
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: _Connection(job["keep_times"]), "127.0.0.1", job["port"]
    )
    return connection


async def _run(job: dict[str, Any]) -> list[Answer]:
    remaining = iter([(_message(job["path"], body), body.get("max_tokens", 0)) for body in job["bodies"]])
    raw: list[tuple[RawAnswer, int]] = []

    async def client() -> None:
        connection = await _connect(job)
        for message, max_tokens in remaining:
            raw.append((await connection.request(message), max_tokens))
        connection.transport.close()

    await asyncio.gather(*(client() for _ in range(job["concurrency"])))
    if job["keep_times"]:
        return [answer.read() for answer, _ in raw]
    return [
        Answer(
            status=int(answer.chunks[0][1][9:12]),
            sent_s=answer.sent_s,
            end_s=answer.chunks[-1][0],
            output_tokens=max_tokens,
        )
        for answer, max_tokens in raw
    ]


def _message(path: str, body: dict[str, Any]) -> bytes:
    if not body:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def main() -> None:
    """Runs jobs, one JSON line each, until the parent closes the pipe."""
    import uvloop

    for line in sys.stdin.buffer:
        job = json.loads(line)
        answers = uvloop.run(_replay(job) if "send_at_s" in job else _run(job))
        sys.stdout.write(json.dumps([asdict(answer) for answer in answers]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
