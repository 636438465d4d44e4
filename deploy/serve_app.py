"""Baton's application on Ray Serve: deploy it, wait for it, delete it. Ray must have been initialized."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import StartupError
from deploy.config_schema import BatonConfig
from deploy.ports import check_port_free
from deploy.progress import Progress
from deploy.ray_errors import essence
from deploy.settings import APP_NAME

_POLL_S = 0.25


def start_serve(config: BatonConfig) -> bool:
    """Starts Serve unless the Ray cluster has it already.

    Returns:
        Whether it was started here.

    Raises:
        ConfigError: something else listens on the router's port.
        StartupError: the Ray cluster has a Baton application already, or Serve does not start.
    """
    from ray import serve
    from ray.exceptions import RayError

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    status = serve.status()
    if APP_NAME in status.applications:
        raise StartupError("this Ray cluster runs a Baton application already; stop that one first")
    if not status.proxies:
        check_port_free(config.router.host, config.router.port)
    try:
        serve.start(
            http_options={"host": config.router.host, "port": config.router.port, "request_timeout_s": None},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
    except (RayError, TimeoutError) as error:
        raise StartupError(f"Ray Serve does not start: {essence(str(error))}") from error
    return not status.proxies


def deploy(config: BatonConfig) -> None:
    """Deploys the application, or changes the one that runs into what the configuration says."""
    from ray import serve

    from deploy.app import build_application

    serve.run_many(
        [serve.RunTarget(build_application(config), name=APP_NAME, route_prefix="/")],
        wait_for_applications_running=False,
    )


def wait_running(
    counts: Mapping[str, range], timeout_s: float, progress: Progress, *, ran_before: bool = False
) -> None:
    """Waits until every replica runs.

    Replicas that have been replaced or are too many finish their requests; nobody waits for them, which
    may take as long as the longest stream. Where a change rolls over several replicas one by one, it goes
    on after this returns.

    Args:
        counts: how many there may be, by deployment. Where that is more than one number, those that cannot
            start are not waited for either.
        timeout_s: in which a replica must run. Each that does gives the next one as long.
        ran_before: the application is being changed; a replica that dies meanwhile is waited for again.

    Raises:
        StartupError: one cannot start, or time is over.
    """
    from ray import serve

    deadline_s = time.monotonic() + timeout_s
    # What starts and dies again and again gets no more time than all of them once.
    num_starts_left = sum(each[-1] for each in counts.values())
    num_running = num_shown = 0
    while True:
        status = serve.status().applications.get(APP_NAME)
        if status is not None:
            if status.status == "RUNNING":
                return
            if status.status == "DEPLOY_FAILED" or (status.status == "UNHEALTHY" and not ran_before):
                raise StartupError(f"the application does not start\n{_why(status)}")
            replicas = {name: _replicas(status, name) for name in counts}
            if any(each.num_leaving for each in replicas.values()) and all(
                replicas[name].settled(counts[name]) for name in counts
            ):
                return
            num_before, num_running = num_running, sum(each.num_running for each in replicas.values())
            if num_running > num_before and num_starts_left:
                num_starts_left -= 1
                deadline_s = time.monotonic() + timeout_s
            num_wanted = sum(replicas[name].num_wanted(counts[name]) for name in counts)
            if num_shown < num_running <= num_wanted:
                num_shown = num_running
                progress(f"{num_shown} of {num_wanted} replicas run")
        if time.monotonic() > deadline_s:
            raise StartupError(f"not ready after startup_timeout_s={timeout_s:g}\n{_why(status)}")
        time.sleep(_POLL_S)


def num_running(deployment: str) -> int:
    """Replicas of one deployment that run."""
    from ray import serve

    status = serve.status().applications.get(APP_NAME)
    return 0 if status is None else _replicas(status, deployment).num_running


def delete(timeout_s: float) -> bool:
    """Takes the application away; its replicas finish what they have.

    Returns:
        Whether it was gone in time. Serve goes on deleting it in any case.
    """
    from ray import serve

    deadline_s = time.monotonic() + timeout_s
    serve.delete(APP_NAME, _blocking=False)
    while APP_NAME in serve.status().applications:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def shut_serve_down_if_unused() -> None:
    from ray import serve

    if not serve.status().applications:
        serve.shutdown()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Ray reports, on standard output, that it stopped what it was told to stop."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@dataclass(frozen=True, slots=True)
class _Replicas:
    """Of one deployment."""

    num_running: int
    num_starting: int
    num_leaving: int

    def settled(self, counts: range) -> bool:
        return self.num_running in counts and (self.num_starting == 0 or len(counts) > 1)

    def num_wanted(self, counts: range) -> int:
        return counts[0] if len(counts) == 1 else self.num_running + self.num_starting


def _replicas(status: Any, deployment: str) -> _Replicas:
    overview = status.deployments.get(deployment)
    states = {} if overview is None else overview.replica_states
    num_running, num_leaving = states.get("RUNNING", 0), states.get("STOPPING", 0)
    return _Replicas(num_running, sum(states.values()) - num_running - num_leaving, num_leaving)


def _why(status: Any) -> str:
    if status is None:
        return "it has no status yet"
    messages = {
        name: deployment.message
        for name, deployment in status.deployments.items()
        if deployment.message and deployment.status != "HEALTHY"
    }
    if not messages:
        return status.message or status.status.value
    return "\n".join(f"{name}: {essence(message)}" for name, message in messages.items())
