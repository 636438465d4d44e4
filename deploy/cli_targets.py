"""Which cluster a command means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import ConfigError

if TYPE_CHECKING:
    from deploy.detached import DetachedRun

DEFAULT_URL = "http://127.0.0.1:8000"


def url_of(target: str | None) -> str:
    """The URL behind a port, a URL, a configuration file, or nothing: what runs in the background, or 8000.

    Raises:
        ConfigError: the file is wrong, or nothing was said and several clusters run in the background.
    """
    if target is None:
        run = only_run()
        return run.url if run else DEFAULT_URL
    if target.isdigit():
        return f"http://127.0.0.1:{target}"
    if target.startswith(("http://", "https://")):
        return target.rstrip("/").removesuffix("/v1")
    from deploy.cluster import service_url
    from deploy.config import load_config

    return service_url(load_config(target))


def only_run() -> DetachedRun | None:
    """The cluster that runs in the background, if one does.

    Raises:
        ConfigError: there are several.
    """
    from deploy import detached

    runs = detached.find_all()
    if len(runs) > 1:
        ports = ", ".join(str(run.port) for run in runs)
        raise ConfigError(f"several clusters run in the background; name a port: {ports}")
    return runs[0] if runs else None
