"""Where a worker's KV side channel listens, so that peers connect before the first handoff."""

from __future__ import annotations

import contextlib
import random
import socket
from typing import Any

import msgspec

_PORTS = range(20_000, 32_000)


class KvPeerAddress(msgspec.Struct, frozen=True):
    """What a connector needs to shake hands with another engine."""

    engine_id: str
    host: str
    port: int
    tp_size: int

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    def as_params(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)

    @staticmethod
    def decode(data: bytes) -> KvPeerAddress:
        """Raises:
        msgspec.DecodeError: ``data`` is not an encoded peer address.
        """
        return msgspec.msgpack.decode(data, type=KvPeerAddress)


def free_port(host: str) -> int:
    """A TCP port nobody listens on, from below the range the system hands out by itself.

    What uses it binds it later: a port from that range could have become somebody's by then, and a busy
    side-channel port makes vLLM's start-up hang.

    Raises:
        OSError: no port could be bound on ``host``.
    """
    attempts = random.SystemRandom().sample(_PORTS, 50)
    for port in attempts:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"none of 50 ports between {_PORTS.start} and {_PORTS.stop} can be bound on {host}")
