"""Keeps Ray Serve's log of a replica open."""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler

_LOGGER = "ray.serve"


def keep_serve_log() -> None:
    """Call in a replica before vLLM is imported.

    Whoever configures logging by a dictionary, as vLLM does on import, closes every handler there is. Serve's
    own then forgets its file; a replica asked for it by a new Serve controller (``is_allocated``) fails, and
    the controller, which has just been restarted, stops every such replica.
    """
    for handler in logging.getLogger(_LOGGER).handlers:
        if isinstance(handler, MemoryHandler):
            handler.close = handler.flush  # type: ignore[method-assign]
