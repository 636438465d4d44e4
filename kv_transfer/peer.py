"""Where a worker's KV side channel listens, so that peers connect before the first handoff."""

from __future__ import annotations

import socket
from typing import Any

import msgspec


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
    """A TCP port nobody listens on. A busy side-channel port makes vLLM's start-up hang."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
