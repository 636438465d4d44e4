"""The log: one line per event, whatever stands in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from telemetry.logs import PACKAGES, configure_logging, fields

LOGGER = logging.getLogger("router.test")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers = root.handlers.copy()
    yield
    root.handlers[:] = handlers
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.NOTSET)


def logged_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_has_time_level_process_message_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker-3")
    LOGGER.info("engine %s", "ready", extra=fields(kv_blocks=4096, startup_s=7.123456789, path="/models/a b"))
    (line,) = logged_lines(capsys)
    time_and_rest = re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (.*)", line)
    assert time_and_rest is not None
    assert (
        time_and_rest[1] == 'INFO worker-3 engine ready kv_blocks=4096 startup_s=7.12346 path="/models/a b"'
    )


def test_line_breaks_and_exceptions_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("router")
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError:
        LOGGER.exception("bad\nname\u2028", extra=fields(tenant="x\nINFO router forged", empty=""))
    (line,) = logged_lines(capsys)
    assert r"bad\nname\u2028" in line
    assert r'tenant="x\nINFO router forged" empty=""' in line
    assert "RuntimeError: first" in line


def test_the_level_is_that_of_the_environment_and_foreign_libraries_stay_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_LOG_LEVEL", "debug")
    configure_logging("router")
    LOGGER.debug("seen")
    logging.getLogger("somebody.else").info("not seen")
    assert len(logged_lines(capsys)) == 1


def test_a_wrong_level_says_how_to_fix_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_LOG_LEVEL", "loud")
    with pytest.raises(ValueError, match="BATON_LOG_LEVEL is 'LOUD': set it to DEBUG"):
        configure_logging("router")


def test_configuring_twice_does_not_log_twice(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("first")
    configure_logging("second")
    LOGGER.warning("once")
    (line,) = logged_lines(capsys)
    assert " second once" in line
