"""What operators ask of the planner, through any router."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query

from telemetry.logs import fields

logger = logging.getLogger(__name__)

AskPlanner = Callable[[int, int | None, bool], Awaitable[dict[str, Any] | None]]
"""Takes how many of its last decisions, the number of one, whether only those that change something."""


def planner_routes(ask: AskPlanner) -> APIRouter:
    """Routes under /baton/planner."""
    routes = APIRouter(prefix="/baton/planner", tags=["baton"])

    @routes.get("")
    async def planner(
        last: Annotated[int, Query(ge=0, le=1000)] = 20, number: int | None = None, moves: bool = False
    ) -> dict[str, Any]:
        """How the planner does, and its last decisions, or the one with this number."""
        try:
            answer = await ask(last, number, moves)
        except Exception as error:  # whatever Ray raises of an actor that is gone
            logger.info("no answer from the planner", extra=fields(error=repr(error)))
            raise HTTPException(
                503, "the planner does not answer; Ray Serve starts it anew if it died"
            ) from error
        if answer is None:
            return {"mode": "off", "decisions": []}
        if number is not None and not answer["decisions"]:
            raise HTTPException(404, f"the planner has no decision {number} in its history")
        return answer

    return routes
