"""Looks after an engine: whether it lives, and whether it answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from core.errors import WorkerLost
from deploy.hang_watch import HangWatch
from engine.base import Engine

WATCH_S = 0.25
"""How soon a death is seen."""
PROBE_PERIOD_S = 1.0


async def watch_engine(engine: Engine, hang: HangWatch, on_look: Callable[[], None]) -> None:
    """Returns when the engine is dead.

    Args:
        hang: told what becomes of the probes sent here.
        on_look: called whenever ``hang`` may have changed its mind.
    """
    probe: asyncio.Task[bool] | None = None
    probed_at_s = time.monotonic()
    while not engine.dead:
        await asyncio.sleep(WATCH_S)  # the engine has no event to wait for
        now_s = time.monotonic()
        if probe is not None:
            hang.look(now_s)
            if probe.done():
                if probe.result():
                    hang.answered()
                probe = None
            on_look()
        elif now_s - probed_at_s >= PROBE_PERIOD_S:
            probe, probed_at_s = asyncio.create_task(_answers(engine), name="probe"), now_s
    if probe is not None:
        probe.cancel()


async def _answers(engine: Engine) -> bool:
    """In the time that the engine gives itself."""
    try:
        await engine.settle()
    except WorkerLost:
        return False
    return True
