"""What the router's log says of streams that end early: which break, and not which are refused."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from vllm.exceptions import GracefulHTTPError

from core.errors import NoWorkerAvailable, Rejected, WorkerLost
from router.refusal_logs import LOGGERS, leave_refusals_out


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)


@pytest.fixture
def records() -> Iterator[Records]:
    records = Records()
    for name in LOGGERS:
        logging.getLogger(name).addHandler(records)
    leave_refusals_out()
    yield records
    for name in LOGGERS:
        logging.getLogger(name).removeHandler(records)


@pytest.mark.parametrize("name", LOGGERS)
@pytest.mark.parametrize(
    ("cause", "num_logged"),
    [
        (Rejected("busy", reason="too_late", status=429, retry_after_s=1), 0),
        (NoWorkerAvailable("nobody goes on with it"), 1),
        (WorkerLost("it died in the middle"), 1),
        (ValueError("something else"), 1),
    ],
)
def test_only_streams_that_break_are_logged(
    name: str, cause: Exception, num_logged: int, records: Records
) -> None:
    logger = importlib.import_module(name).logger
    try:
        raise GracefulHTTPError(str(cause), HTTPStatus.SERVICE_UNAVAILABLE) from cause
    except GracefulHTTPError:
        logger.exception("Error in a stream.")
    logger.error("an error without an exception")
    assert len(records.seen) == num_logged + 1
