"""Is a port free, does one answer."""

from __future__ import annotations

import socket

from core.errors import ConfigError, StartupError


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


def check_answers(key: str, address: str, timeout_s: float = 5.0) -> None:
    """
    Args:
        key: of the configuration, for the message.
        address: what is not ``host:port`` is not checked.

    Raises:
        StartupError: nobody listens there. Ray itself would try for minutes.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError as error:
        raise StartupError(f"{key}: nobody answers at {address}: {error}") from error
