"""A cluster that lives as long as this program, and ends with the program's signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from deploy.cluster import Cluster
from deploy.config_schema import BatonConfig
from deploy.progress import Progress

_KILLED = 128 + signal.SIGKILL
_WATCH_S = 0.5


@contextlib.contextmanager
def running_cluster(config: BatonConfig, progress: Progress) -> Iterator[Cluster]:
    """A cluster that is ready.

    SIGINT and SIGTERM raise KeyboardInterrupt in the body (and while it starts). A second one, while
    the cluster finishes what it has, ends every process at once, this one included.

    Raises:
        ConfigError: see :meth:`Cluster.start`.
        StartupError: see :meth:`Cluster.start`; it has a note saying where the logs are.
    """
    with _interrupting_signals():
        cluster = Cluster(config, progress)
        try:
            cluster.start()
            yield cluster
        except Exception as error:
            if cluster.log_dir is not None:
                error.add_note(f"logs of every process: {cluster.log_dir}")
            raise
        finally:
            try:
                cluster.stop()
            except KeyboardInterrupt:
                cluster.kill()
                os._exit(_KILLED)


def wait_for_signal(cluster: Cluster) -> None:
    """Returns at SIGINT or SIGTERM; to be called inside :func:`running_cluster`.

    If the cluster's own Ray dies, this program ends with exit status 1, and every process of the cluster too:
    nobody could serve or be told to stop any more, and Ray's own goodbye would wait for Ray.
    """
    with contextlib.suppress(KeyboardInterrupt):
        never = threading.Event()
        while (lost := cluster.lost_process()) is None:
            never.wait(_WATCH_S)
        print(
            f"error: Ray's {lost} has died, so nothing can be served; logs: {cluster.log_dir}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        cluster.kill()
        os._exit(1)


@contextlib.contextmanager
def _interrupting_signals() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, _interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
