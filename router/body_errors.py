"""Bodies that vLLM's request models stumble over: the client's mistake, answered 400 and not 500.

Its validators look into a body before its types have been checked, and fail on what is no object.
"""

from __future__ import annotations

import traceback

from fastapi import FastAPI, Request
from starlette.responses import Response
from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler
from vllm.exceptions import VLLMValidationError

_STUMBLES = (AttributeError, LookupError, AssertionError, RecursionError)
_READS_BODIES = "fastapi.dependencies.utils"


def answer_stumbles(app: FastAPI) -> None:
    """Gives ``app`` its answers to these; vLLM's own handlers know the other kinds."""
    for kind in _STUMBLES:
        app.add_exception_handler(kind, _answer)
    if app.middleware_stack is not None:  # built when the SageMaker routes were added, without these
        app.middleware_stack = app.build_middleware_stack()


async def _answer(request: Request, error: Exception) -> Response:
    reading = any(
        frame.f_globals.get("__name__") == _READS_BODIES
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    if reading:
        error = VLLMValidationError(f"the request does not have the expected form: {error}")
    return await exception_handler(request, error)
