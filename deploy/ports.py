"""The port clients talk to."""

from __future__ import annotations

import socket

from core.errors import ConfigError


def check_port_free(host: str, port: int) -> None:
    """
    Raises:
        ConfigError: something listens on the port, or the host is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"router.port: cannot listen on {host}:{port} ({error.strerror}); "
            "stop what listens there or choose another port"
        ) from error
