"""Keeps requests that are turned away out of vLLM's log of errors."""

from __future__ import annotations

import logging

from vllm.exceptions import GracefulHTTPError

from core.errors import Rejected

LOGGERS = (
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.completion.serving",
    "vllm.entrypoints.anthropic.api_router",
)


class _RefusalsLeftOut(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, GracefulHTTPError) and isinstance(error.__cause__, Rejected))


_FILTER = _RefusalsLeftOut()


def leave_refusals_out() -> None:
    """To be called once in a process; again does nothing.

    vLLM logs a traceback for every streamed answer that ends with an exception, and for every Anthropic
    message. Under overload most are refusals, and writing a traceback takes longer than to refuse. Metrics
    and the request's trace tell of them, also where one of several choices is refused after another has
    begun. Streams that break are logged as before.
    """
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
