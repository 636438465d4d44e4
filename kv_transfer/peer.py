"""Where a worker's KV side channel listens, so that peers connect before the first handoff."""

from __future__ import annotations

import contextlib
import random
import socket
from typing import Annotated, Any

import msgspec

from core.errors import KvHandleError

_PORTS = range(20_000, 32_000)


class KvPeerAddress(msgspec.Struct, frozen=True):
    """What a connector needs to shake hands with another engine."""

    engine_id: str
    host: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    def as_params(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)

    @staticmethod
    def decode(data: bytes) -> KvPeerAddress:
        """
        Raises:
            KvHandleError: ``malformed``, ``data`` is not an encoded peer address.
        """
        try:
            return msgspec.msgpack.decode(data, type=KvPeerAddress)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise KvHandleError("malformed", f"KV peer address does not decode: {error}") from error


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
