"""NIXL agents for the connector: byte accounting everywhere, polled progress on CPU.

NIXL's own progress thread spins: an idle engine costs a core. On CPU, progress is made by a thread
that polls every few milliseconds instead; what it finds waits for the connector's next look.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import defaultdict
from typing import Any

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.005
_RETRY_S = 0.5


class CountingAgent:
    """A NIXL agent that remembers the bytes of each finished transfer until they are asked for."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._bytes_by_handle: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def get_xfer_telemetry(self, handle: Any) -> Any:
        telemetry = self._agent.get_xfer_telemetry(handle)
        self._bytes_by_handle[id(handle)] = telemetry.totalBytes
        return telemetry

    def take_bytes(self, handle: Any) -> int:
        """Bytes of a finished transfer; 0 if its telemetry was never read."""
        return self._bytes_by_handle.pop(id(handle), 0)


class PolledAgent(CountingAgent):
    """A NIXL agent without a progress thread, polled for notifications from a slow thread."""

    def __init__(self, agent: Any) -> None:
        super().__init__(agent)
        self._lock = threading.Lock()
        self._pending: dict[str, list[bytes]] = defaultdict(list)
        self._stop = threading.Event()
        threading.Thread(target=self._poll, name="baton-nixl-poll", daemon=True).start()

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        with self._lock:
            self._collect()
            pending, self._pending = self._pending, defaultdict(list)
        return pending

    def stop_polling(self) -> None:
        self._stop.set()

    def _poll(self) -> None:
        while not self._stop.wait(_POLL_INTERVAL_S):
            try:
                with self._lock:
                    self._collect()
            except Exception:  # without this thread every pull from an idle engine would hang
                logger.exception("NIXL notifications could not be read")
                self._stop.wait(_RETRY_S)

    def _collect(self) -> None:
        for agent_name, messages in self._agent.get_new_notifs().items():
            self._pending[agent_name].extend(messages)


def make_polled_agent(
    agent_class: Any, config_class: Any, num_threads: int, backends: list[str]
) -> PolledAgent:
    """A CPU agent: no progress thread, every call of the agent safe from two threads."""
    from nixl._api import nixl_thread_sync_t

    config = config_class(
        enable_prog_thread=False,
        capture_telemetry=True,
        num_threads=num_threads if backends == ["UCX"] else 0,
        backends=backends,
        sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
    )
    return PolledAgent(agent_class(str(uuid.uuid4()), config))
