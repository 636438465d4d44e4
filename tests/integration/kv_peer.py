"""Prefill workers that come and go quickly, for a decode engine to meet.

    python -m tests.integration.kv_peer HANDSHAKE NUM_BLOCKS
    python -m tests.integration.kv_peer --engine MODEL_PATH

The process imports everything once. For each line on its standard input it forks one more peer and writes
one line that describes it, LINE and JSON; the peer lives until it is killed.

The first form makes the KV side of a prefill worker without its engine, in a tenth of a second: a real
NIXL agent and a real handshake in front of empty blocks, with the geometry of the engine whose handshake
payload is in the file HANDSHAKE. The second form starts real engines, in seconds, and has each prefill
the prompt that the line holds as a JSON list.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import signal
import sys
import threading
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from kv_transfer.peer import KvPeerAddress, free_port
from tests.integration.server_process import HOST

LINE = "peer:"
_kept: list[mmap.mmap] = []
_MAP_NORESERVE = 0x4000  # Linux; Python's mmap has a name for it from 3.14 on


def read_handshake(peer: KvPeerAddress) -> bytes:
    """Asks an engine for its handshake payload, as another engine does."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG

    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.connect(f"tcp://{peer.host}:{peer.port}")
        socket.send(msgspec.msgpack.encode((GET_META_MSG, 0, 0)))
        return socket.recv_multipart()[0]


def main() -> None:
    from kv_transfer.connector import die_with_parent  # with it comes the whole of vLLM

    first, second = sys.argv[1:]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    _say()
    for line in sys.stdin:
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent()
        if first == "--engine":
            asyncio.run(_serve_engine(second, json.loads(line)))
        else:
            _serve_blocks(Path(first).read_bytes(), int(second))


def _say(**about: Any) -> None:
    print(LINE, json.dumps({"pid": os.getpid(), **about}), flush=True)


def _serve_blocks(handshake: bytes, num_blocks: int) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import NixlBaseConnectorScheduler
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
        NixlAgentMetadata,
        NixlHandshakePayload,
    )

    from kv_transfer.nixl_agent import make_polled_agent

    payload = msgspec.msgpack.decode(handshake, type=NixlHandshakePayload)
    model = msgspec.msgpack.decode(payload.agent_metadata_bytes, type=NixlAgentMetadata)
    agent = make_polled_agent(base_worker.NixlWrapper, base_worker.nixl_agent_config, 0, ["UCX"])
    regions = [_memory(num_blocks * stride) for stride in model.block_strides]
    ranges = [(address, size, 0, "") for address, size in regions]
    agent.register_memory(agent.get_reg_descs(ranges, "DRAM"), backends=["UCX"])
    metadata = replace(
        model,
        engine_id=uuid.uuid4().hex,
        agent_metadata=agent.get_agent_metadata(),
        kv_caches_base_addr=[address for address, _ in regions],
        num_blocks=num_blocks,
        region_num_blocks=[num_blocks] * len(regions),
    )
    payload = replace(payload, agent_metadata_bytes=msgspec.msgpack.encode(metadata))
    port, ready = free_port(HOST), threading.Event()
    threading.Thread(
        target=NixlBaseConnectorScheduler._nixl_handshake_listener,
        args=({(0, 0): msgspec.msgpack.encode(payload)}, ready, threading.Event(), HOST, port),
        daemon=True,
    ).start()
    ready.wait()
    _say(engine_id=metadata.engine_id, port=port)
    while True:
        signal.pause()


def _memory(size: int) -> tuple[int, int]:
    """Address and size of memory that takes no room until it is written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, size, flags=flags)
    _kept.append(memory)
    return ctypes.addressof(ctypes.c_char.from_buffer(memory)), size


async def _serve_engine(model_path: str, prompt: list[int]) -> None:
    from engine.vllm_engine import VllmEngine
    from kv_transfer.params import keep_for_pull, pinned_kv
    from tests.integration.engine_process import engine_spec
    from tests.integration.vllm_workers import greedy, run

    spec = engine_spec(model_path, incarnation=uuid.uuid4().hex)
    engine = await VllmEngine.start(spec)
    answer, last = await run(engine, greedy(prompt, 1, keep_for_pull()))
    pinned = pinned_kv(last.kv_params)
    assert pinned is not None
    _say(
        engine_id=spec.incarnation,
        port=spec.side_channel_port,
        first_token=answer.token_ids[0],
        connector_params=pinned.connector_params,
        expires_at_s=pinned.expires_at_s,
    )
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
