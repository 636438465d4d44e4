"""Reads the KV cache events of a vLLM engine into a CacheLog.

The engine publishes a batch a step over ZeroMQ, numbered. Missing numbers are asked for again; if the
engine has forgotten them, what was known is dropped, and the log goes on from a clear.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import Any

import msgspec
import zmq

from engine.cache_log import CacheChange, CacheLog
from engine.cached_blocks import CachedBlocks
from engine.own_directory import OwnDirectory
from telemetry.logs import fields

logger = logging.getLogger(__name__)

_KEPT_BATCHES = 2_000
"""What the engine can send again. A batch holds the tokens of a step's new blocks: some 30 kB at most."""
_REPLAY_TIMEOUT_MS = 5_000
_STOP = b""
_BATCHES_AT_ONCE = 64
_END_SEQ = (-1).to_bytes(8, "big", signed=True)


class KvEventReader:
    """Make it before the engine, whose configuration names its sockets; start it once the engine is up.

    The sockets lie in a directory that only this user can enter: events hold the tokens of prompts.
    """

    def __init__(self, *, kept_batches: int = _KEPT_BATCHES) -> None:
        self.log = CacheLog()
        self.num_lost = 0
        """Times that batches were lost for good and the log was cleared."""
        self._kept_batches = kept_batches
        self._directory = OwnDirectory("baton-kv-")
        path = self._directory.path
        self._endpoint = f"ipc://{path}/events"
        self._replay_endpoint = f"ipc://{path}/replay"
        self._stop_endpoint = f"inproc://stop-{path.name}"
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._thread: threading.Thread | None = None

    def config(self) -> Any:
        """vLLM's KVEventsConfig for the engine."""
        from vllm.config import KVEventsConfig

        return KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=self._endpoint,
            replay_endpoint=self._replay_endpoint,
            buffer_steps=self._kept_batches,
            hwm=self._kept_batches,
        )

    def start(self, *, model: str, block_size_tokens: int) -> None:
        """Follows the engine from a thread; the log changes on the event loop that runs now.

        Args:
            model, block_size_tokens: what the states of the log are made for.
        """
        blocks = CachedBlocks(model=model, block_size_tokens=block_size_tokens)
        self._context = zmq.Context()
        self._stop = self._context.socket(zmq.PAIR)
        self._stop.bind(self._stop_endpoint)
        stop = self._context.socket(zmq.PAIR)
        stop.connect(self._stop_endpoint)
        self._thread = threading.Thread(
            target=self._run, args=(blocks, stop, asyncio.get_running_loop()), name="kv-events", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops following; blocks for as long as a batch takes. Safe to call twice."""
        if self._thread is not None and self._context is not None:
            self._stop.send(_STOP)
            self._thread.join()
            self._stop.close(linger=0)
            self._context.term()
            self._thread = None
        self._directory.remove()

    # In the thread.

    def _run(self, blocks: CachedBlocks, stop: zmq.Socket[bytes], loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._follow(blocks, stop, loop)
        except Exception:
            logger.exception("KV events are not read any more")
            self._publish([blocks.clear()], loop)
        finally:
            stop.close(linger=0)

    def _follow(self, blocks: CachedBlocks, stop: zmq.Socket[bytes], loop: asyncio.AbstractEventLoop) -> None:
        assert self._context is not None
        with self._context.socket(zmq.SUB) as events:
            events.set_hwm(self._kept_batches)
            events.subscribe(b"")
            events.connect(self._endpoint)
            poller = zmq.Poller()
            poller.register(events, zmq.POLLIN)
            poller.register(stop, zmq.POLLIN)
            stream = _Stream(blocks)
            while True:
                ready = dict(poller.poll())
                if stop in ready:
                    return
                changes: list[CacheChange] = []
                for seq, payload in _receive(events):
                    if seq > stream.next_seq:
                        changes += self._fill(stream, seq, stop)
                    changes += stream.take(seq, payload)
                self._publish(changes, loop)

    def _fill(self, stream: _Stream, seq: int, stop: zmq.Socket[bytes]) -> list[CacheChange]:
        """Asks the engine for what is missing in front of ``seq``."""
        changes = self._replay(stream, stop)
        if stream.next_seq < seq:
            self.num_lost += 1
            logger.warning(
                "KV events lost; what the cache holds is not known any more",
                extra=fields(first=stream.next_seq, num_batches=seq - stream.next_seq),
            )
            changes += stream.skip_to(seq)
        return changes

    def _replay(self, stream: _Stream, stop: zmq.Socket[bytes]) -> list[CacheChange]:
        changes: list[CacheChange] = []
        assert self._context is not None
        with self._context.socket(zmq.DEALER) as replay:
            replay.set_hwm(0)
            replay.linger = 0
            replay.connect(self._replay_endpoint)
            replay.send_multipart((b"", stream.next_seq.to_bytes(8, "big")))
            poller = zmq.Poller()
            poller.register(replay, zmq.POLLIN)
            poller.register(stop, zmq.POLLIN)
            while replay in dict(poller.poll(_REPLAY_TIMEOUT_MS)):
                _, _, seq_bytes, payload = replay.recv_multipart()
                seq = int.from_bytes(seq_bytes, "big")
                if seq_bytes == _END_SEQ or seq > stream.next_seq:
                    break
                changes += stream.take(seq, payload)
        return changes

    def _publish(self, changes: list[CacheChange], loop: asyncio.AbstractEventLoop) -> None:
        if changes:
            with contextlib.suppress(RuntimeError):  # the loop was closed first: nobody follows any more
                loop.call_soon_threadsafe(self.log.apply, changes)


class _Stream:
    """Batches in the order of their numbers, each once."""

    def __init__(self, blocks: CachedBlocks) -> None:
        self.next_seq = 0
        self._blocks = blocks

    def take(self, seq: int, payload: bytes) -> list[CacheChange]:
        if seq < self.next_seq:
            return []
        self.next_seq = seq + 1
        try:
            return self._blocks.apply(payload)
        except msgspec.DecodeError:
            logger.exception("a batch of KV events could not be read", extra=fields(seq=seq))
            return [self._blocks.clear()]

    def skip_to(self, seq: int) -> list[CacheChange]:
        """Gives up what is missing."""
        self.next_seq = seq
        return [self._blocks.clear()]


def _receive(events: zmq.Socket[bytes]) -> list[tuple[int, bytes]]:
    """Batches that have arrived, a limited number at a time."""
    batches: list[tuple[int, bytes]] = []
    with contextlib.suppress(zmq.Again):
        while len(batches) < _BATCHES_AT_ONCE:
            _, seq, payload = events.recv_multipart(zmq.NOBLOCK)
            batches.append((int.from_bytes(seq, "big"), payload))
    return batches
