"""A running Baton: Ray if need be, the Serve application, readiness, and an end that leaves nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from core.errors import StartupError
from deploy import serve_app
from deploy.config_checks import require_local_files
from deploy.config_schema import BatonConfig, ShapeConfig
from deploy.environment import ray_environment, serve_environment
from deploy.ports import check_answers, check_port_free
from deploy.processes import ProcessGuard
from deploy.progress import Progress
from deploy.settings import (
    CLUSTER_KEY_VARIABLE,
    LOOPBACK,
    PLANNER_NAME,
    REGISTRY_NAME,
    ROUTER_NAME,
    shutdown_limit_s,
    worker_deployment_name,
)

_POLL_S = 0.25
_DELETE_SLACK_S = 5.0
_RAY_PROCESSES = frozenset({"gcs_server", "raylet"})
_RAY_QUIET = {"logging_level": "ERROR", "log_to_driver": False}


class Cluster:
    """One Baton application and, unless the configuration names a Ray cluster, its own Ray.

    Use as a context manager; leaving it ends every process it started.
    """

    def __init__(self, config: BatonConfig, progress: Progress = lambda _: None) -> None:
        self._config = config
        self._progress = progress
        self._run_dir: Path | None = None
        self._guard = ProcessGuard()
        self._in_ray = False
        self._deployed = False
        self._ready = False
        self._owns_serve = False
        self._ray_processes: list[psutil.Process] = []
        """Without any one of them there is no Ray."""
        self.log_dir: Path | None = None
        """Where Ray keeps the logs of every process, once Ray runs."""

    @property
    def url(self) -> str:
        return service_url(self._config)

    @property
    def mark(self) -> str | None:
        """Value of ``processes.MARK`` in the environment of every process started here."""
        return self._guard.mark

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Start.

    def start(self) -> None:
        """Starts everything and waits until it can serve.

        Raises:
            ConfigError: the port is taken or the model is not there; nothing has been started.
            StartupError: it was not ready in time, or a replica cannot start.
        """
        if self._config.ray.address is None:
            require_local_files(self._config)
            check_port_free(self._config.router.host, self._config.router.port)
            self._start_ray()
        else:
            self._join_ray(self._config.ray.address)
        self._progress("starting Ray Serve")
        self._owns_serve = serve_app.start_serve(self._config)
        self._deployed = True
        self._progress("starting registry, workers and routers")
        self._deploy()

    def update(self, config: BatonConfig) -> None:
        """Applies a changed configuration in place, as a rolling update of what it changes.

        Raises:
            StartupError: it was not ready in time.
        """
        self._config = config
        self._progress("changing the application")
        self._deploy()

    def _start_ray(self) -> None:
        import ray

        self._progress("starting Ray")
        self._run_dir = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
        os.environ.update(ray_environment(self._config, self._run_dir))
        self._guard.watch()
        self._in_ray = True
        options: dict[str, Any] = _RAY_QUIET | {"log_to_driver": bool(os.environ.get("BATON_DRIVER_LOGS"))}
        with _sigterm_kept():
            context = ray.init(
                address="local",
                num_cpus=self._config.ray.num_cpus,
                include_dashboard=self._config.ray.dashboard,
                **options,
            )
        self.log_dir = _log_dir(context)
        children = psutil.Process().children()
        self._ray_processes = [child for child in children if child.name() in _RAY_PROCESSES]

    def _join_ray(self, address: str) -> None:
        import ray

        self._progress(f"joining Ray at {address}")
        check_answers("ray.address", address)
        # A Ray job's own runtime environment is in its environment already and must not be given twice.
        serve_env = serve_environment(self._config).items()
        missing = {name: value for name, value in serve_env if os.environ.get(name) != value}
        os.environ.update(missing)
        options: dict[str, Any] = _RAY_QUIET | {"runtime_env": {"env_vars": missing}}
        try:
            with _sigterm_kept():
                context = ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise StartupError(f"ray.address: cannot join a Ray cluster at {address!r}: {error}") from error
        self._in_ray = True
        self.log_dir = _log_dir(context)

    def _deploy(self) -> None:
        # One for every deployment from here: another key would be another set of workers.
        os.environ.setdefault(CLUSTER_KEY_VARIABLE, secrets.token_hex(32))
        serve_app.deploy(self._config)
        timeout_s = self._config.startup_timeout_s
        serve_app.wait_running(self._counts(), timeout_s, self._progress, ran_before=self._ready)
        self._progress("waiting for the pools")
        deadline_s = time.monotonic() + timeout_s
        while not self._pools_complete():
            if time.monotonic() > deadline_s:
                raise StartupError(
                    f"every replica runs, but the router at {self.url} does not see all the workers"
                )
            time.sleep(_POLL_S)
        self._ready = True

    def _counts(self) -> dict[str, range]:
        """Replicas by deployment."""
        fixed = {REGISTRY_NAME: 1, ROUTER_NAME: self._config.router.replicas}
        if self._config.planner.mode != "off":
            fixed[PLANNER_NAME] = 1
        workers = {worker_deployment_name(shape.name): shape.counts for shape in self._shapes()}
        return {name: range(count, count + 1) for name, count in fixed.items()} | workers

    def _shapes(self) -> list[ShapeConfig]:
        return [shape for model in self._config.models for shape in model.shapes]

    def _pools_complete(self) -> bool:
        with contextlib.suppress(StartupError):
            workers = fetch_status(self.url)["workers"]
            ready = Counter(worker["shape"] for worker in workers if worker["state"] == "ready")
            return all(self._pool_complete(shape, ready[shape.name]) for shape in self._shapes())
        return False

    def _pool_complete(self, shape: ShapeConfig, num_ready: int) -> bool:
        if len(shape.counts) == 1:
            return num_ready == shape.count
        # The planner may have changed it already.
        return num_ready >= min(shape.count, serve_app.num_running(worker_deployment_name(shape.name)))

    def lost_process(self) -> str | None:
        """The process of its own Ray that has died, if one has: nothing can be served then."""
        return next((each for each, alive in map(_name_and_life, self._ray_processes) if not alive), None)

    # End.

    def stop(self) -> None:
        """Ends the application and, if it was started here, Ray with every process of it.

        Requests in flight may finish, for ``drain_timeout_s`` at most.
        """
        if self._in_ray:
            import ray

            limit = f"; requests may finish for {self._config.drain_timeout_s:g} s" if self._ready else ""
            self._progress(f"stopping{limit}")
            with serve_app.hushed():
                # Serve, or Ray itself, may be gone already.
                with contextlib.suppress(Exception):
                    self._end_application()
                ray.shutdown()
        self._guard.end_all()
        self._remove_run_dir()

    def _end_application(self) -> None:
        owns_ray = self._config.ray.address is None
        if not self._deployed or (owns_ray and not self._ready):
            return  # nothing was served yet: the end of Ray is the end of it all
        serve_app.delete(shutdown_limit_s(self._config) + _DELETE_SLACK_S)
        if self._owns_serve:
            serve_app.shut_serve_down_if_unused()

    def kill(self) -> None:
        """Ends at once every process started here. The caller has to exit: Ray is pulled from under it."""
        self._guard.end_all(grace_s=0)
        self._remove_run_dir()

    def _remove_run_dir(self) -> None:
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)


def service_url(config: BatonConfig) -> str:
    """Where a cluster of this configuration answers, seen from its own machine."""
    host = config.router.host
    return f"http://{LOOPBACK if host == '0.0.0.0' else host}:{config.router.port}"


def fetch_status(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """The cluster as a router sees it.

    Raises:
        StartupError: nothing that answers like a router is there.
    """
    try:
        response = httpx.get(f"{url}/baton/status", timeout=timeout_s)
        response.raise_for_status()
        return response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise StartupError(f"no Baton router answers at {url}: {error}") from error


def _name_and_life(process: psutil.Process) -> tuple[str, bool]:
    try:
        return process.name(), process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return "a process", False


def _log_dir(context: Any) -> Path | None:
    session_dir = context.address_info.get("session_dir")
    return Path(session_dir) / "logs" if session_dir else None


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """``ray.init`` puts its own handler of SIGTERM in place of the program's."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
