"""A worker on a real engine in a process of its own: both legs behind gRPC.

    python -m tests.faults.worker_process NAME MODEL_PATH HOST LEASE_S [ENGINE_ARGS]

Prints its report as JSON once it is ready, and ends when its standard input closes.

Args:
    HOST: where other workers reach it; routers may come from anywhere.
    ENGINE_ARGS: JSON, on top of those of ``tests.integration.engine_process``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import msgspec

from core.types import Role, WorkerReport
from tests.integration.vllm_workers import vllm_worker

READY = "worker ready: "


def report_in(output: str) -> WorkerReport | None:
    """What the worker says of itself, once it has said it."""
    for line in output.splitlines():
        if READY in line:
            return msgspec.json.decode(line.split(READY, 1)[1], type=WorkerReport)
    return None


async def main() -> None:
    name, model_path, host, lease_s, *engine_args = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    async with vllm_worker(
        name, Path(model_path), host=host, lease_s=int(lease_s), **json.loads(*engine_args or ("{}",))
    ) as worker:
        print(READY + msgspec.json.encode(worker.report(Role.DECODE)).decode(), flush=True)
        await asyncio.to_thread(sys.stdin.buffer.read)


if __name__ == "__main__":
    asyncio.run(main())
