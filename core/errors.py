"""The errors Baton raises.

BatonError
├── ConfigError            the user's configuration or command line is wrong
├── StartupError           a worker, router or cluster did not come up in time
├── ScalingError           Ray Serve did not take up a number of workers
├── RequestRefused         a worker will not take this request now
│   ├── Draining           it is on its way out
│   └── Overloaded         its queue or its KV cache is full
├── WorkerLost             the worker died or its channel broke while it held the request
│   └── WorkerSilent       it said nothing for too long
├── NoWorkerAvailable      no worker of the model can take the request
├── Rejected               a router will not take the request: too much is waiting already
└── KvHandleError          a KV handle does not fit (forged, stale, other model, other tokens)

Foreign errors are wrapped once, where they enter, with the cause chained. They become HTTP or gRPC
codes once, where they leave.
"""

from __future__ import annotations


class BatonError(Exception):
    """Base of every error Baton raises on purpose."""


class ConfigError(BatonError):
    """The configuration or a command-line argument is wrong; the message names the key and the fix."""


class StartupError(BatonError):
    """A process did not become ready within its time limit."""


class ScalingError(BatonError):
    """Ray Serve does not say how many workers it works towards, or does not take a number up, in time."""


class RequestRefused(BatonError):
    """A worker refused a request before doing any work for it; another worker may take it."""


class Draining(RequestRefused):
    """The worker is draining: it finishes what it has and takes nothing new."""


class Overloaded(RequestRefused):
    """The worker's queue or KV cache is full."""


class WorkerLost(BatonError):
    """The worker died or became unreachable while it held a request."""


class WorkerSilent(WorkerLost):
    """The worker is connected and gave no token within the time it had."""


class NoWorkerAvailable(BatonError):
    """No worker of the model can take the request; ``retry_after_s`` says when to try again."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Rejected(BatonError):
    """A router refuses a request before any work has been done for it.

    Args:
        reason: a short metric label.
        status: the HTTP status: 429 on arrival, 503 once it had waited.
        retry_after_s: when it may be worth to try again, in whole seconds.
    """

    def __init__(self, message: str, *, reason: str, status: int, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status
        self.retry_after_s = retry_after_s


class KvHandleError(BatonError):
    """A KV handle does not fit this worker or this prompt; ``reason`` is a short metric label."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
