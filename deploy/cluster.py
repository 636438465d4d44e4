"""A running Baton: Ray if need be, the Serve application, readiness, and an end that leaves nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from core.errors import ConfigError, StartupError
from deploy.config import BatonConfig
from deploy.environment import ray_environment
from deploy.processes import ProcessGuard
from deploy.settings import APP_NAME, CLUSTER_KEY_VARIABLE, LOOPBACK

_POLL_S = 0.25
Progress = Callable[[str], None]


class Cluster:
    """One Baton application and, unless the configuration names a Ray cluster, its own Ray.

    Use as a context manager; leaving it ends every process it started.
    """

    def __init__(self, config: BatonConfig, progress: Progress = lambda _: None) -> None:
        self._config = config
        self._progress = progress
        self._run_dir: Path | None = None
        self._guard = ProcessGuard()

    @property
    def url(self) -> str:
        host = self._config.router.host
        return f"http://{LOOPBACK if host == '0.0.0.0' else host}:{self._config.router.port}"

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts everything and waits until it can serve.

        Raises:
            ConfigError: the port is taken or the model is not there; nothing has been started.
            StartupError: it was not ready in time, or a replica cannot start.
        """
        check_model_path(self._config)
        if self._config.ray.address is None:
            check_port_free(self._config.router.host, self._config.router.port)
            self._start_ray()
        else:
            self._join_ray(self._config.ray.address)
        self._deploy()
        self._wait_ready()

    def update(self, config: BatonConfig) -> None:
        """Applies a changed configuration in place, as a rolling update of what it changes.

        Raises:
            StartupError: it was not ready in time.
        """
        self._config = config
        self._deploy()
        self._wait_ready()

    def _start_ray(self) -> None:
        import ray

        self._progress("starting Ray")
        self._run_dir = Path(tempfile.mkdtemp(prefix="baton-"))
        os.environ.update(ray_environment(self._config, self._run_dir))
        os.environ.setdefault(CLUSTER_KEY_VARIABLE, secrets.token_hex(32))
        for variable in ("STATS", "METRICS"):
            os.environ[f"RAY_SERVE_HAPROXY_{variable}_PORT"] = str(_free_port())
        self._guard.watch()
        ray.init(
            address="local",
            num_cpus=self._config.ray.num_cpus,
            include_dashboard=self._config.ray.dashboard,
            log_to_driver=bool(os.environ.get("BATON_DRIVER_LOGS")),
            logging_level="WARNING",
            configure_logging=True,
        )

    def _join_ray(self, address: str) -> None:
        import ray

        self._progress(f"joining Ray at {address}")
        try:
            ray.init(address=address, logging_level="WARNING", log_to_driver=False)
        except ConnectionError as error:
            raise StartupError(f"no Ray cluster at ray.address {address!r}: {error}") from error

    def _deploy(self) -> None:
        from ray import serve

        from deploy.app import build_application

        self._progress("starting registry, workers and router")
        router = self._config.router
        serve.start(
            http_options={"host": router.host, "port": router.port, "request_timeout_s": None},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run_many(
            [serve.RunTarget(build_application(self._config), name=APP_NAME, route_prefix="/")],
            wait_for_applications_running=False,
        )

    def _wait_ready(self) -> None:
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        deadline_s = time.monotonic() + self._config.startup_timeout_s
        while True:
            status = serve.status().applications.get(APP_NAME)
            if status is not None and status.status == ApplicationStatus.RUNNING:
                break
            if status is not None and status.status in (
                ApplicationStatus.DEPLOY_FAILED,
                ApplicationStatus.UNHEALTHY,
            ):
                raise StartupError(f"the application does not start: {_why(status)}")
            if time.monotonic() > deadline_s:
                raise StartupError(
                    f"not ready after startup_timeout_s={self._config.startup_timeout_s:.0f}: {_why(status)}"
                )
            time.sleep(_POLL_S)
        self._progress("waiting for the pools")
        while not self._pools_complete():
            if time.monotonic() > deadline_s:
                raise StartupError("the workers run, but not all of them are in the router's view")
            time.sleep(_POLL_S)

    def _pools_complete(self) -> bool:
        expected = sum(shape.count for model in self._config.models for shape in model.shapes)
        with contextlib.suppress(httpx.HTTPError, StartupError):
            workers = fetch_status(self.url)["workers"]
            return sum(worker["state"] == "ready" for worker in workers) == expected
        return False

    def stop(self) -> None:
        """Ends the application and, if it was started here, Ray with every process of it."""
        import ray

        if ray.is_initialized():
            from ray import serve

            self._progress("stopping")
            with contextlib.suppress(Exception):
                if self._config.ray.address is None:
                    serve.shutdown()
                else:
                    serve.delete(APP_NAME)
            ray.shutdown()
        self._guard.end_all()
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)


def fetch_status(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """The cluster as a router sees it.

    Raises:
        StartupError: nothing that answers like a router is there.
    """
    try:
        response = httpx.get(f"{url}/baton/status", timeout=timeout_s)
        response.raise_for_status()
        return response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise StartupError(f"no Baton router answers at {url}: {error}") from error


def check_port_free(host: str, port: int) -> None:
    """
    Raises:
        ConfigError: something listens on the port, or the host is not this machine's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"router.port: cannot listen on {host}:{port} ({error.strerror}); "
                "stop what listens there or choose another port"
            ) from error


def check_model_path(config: BatonConfig) -> None:
    """
    Raises:
        ConfigError: a local model directory is missing or holds no model.
    """
    for model in config.models:
        path = Path(model.path)
        if path.is_absolute() and not (path / "config.json").is_file():
            raise ConfigError(
                f"models[{model.name}].path: {path} is not a Hugging Face model directory (no config.json)"
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _why(status: Any) -> str:
    if status is None:
        return "it has no status yet"
    parts = [status.message] if status.message else []
    parts += [
        f"{name}: {deployment.message}"
        for name, deployment in status.deployments.items()
        if deployment.message and deployment.status != "HEALTHY"
    ]
    return "; ".join(parts) or str(status.status)
