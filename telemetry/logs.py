"""One line per event: time, level, process, message, then fields as key=value.

    2026-03-01T12:00:00.123Z INFO worker-3 engine ready kv_blocks=4096 startup_s=7.1

Modules log with the standard library::

    logger = logging.getLogger(__name__)
    logger.info("engine ready", extra=fields(kv_blocks=4096, startup_s=7.1))
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from typing import Any

PACKAGES = (
    *("core", "telemetry", "baton_proto", "engine", "kv_transfer", "router", "planner"),
    *("prefill_workers", "decode_workers", "simulator", "deploy"),
)
"""Loggers whose level BATON_LOG_LEVEL sets; other libraries speak up from WARNING."""

_PLAIN_VALUE = re.compile(r"[\w.:/@%+,\[\]-]+\Z", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """Fields for one event, to be passed as ``extra``; units belong in the names."""
    return {"fields": values}


class _LineFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        parts = [
            f"{moment}.{int(record.msecs):03d}Z",
            record.levelname,
            self._process,
            _CONTROL.sub(_escape, record.getMessage()),
        ]
        parts += [f"{key}={_value(value)}" for key, value in getattr(record, "fields", {}).items()]
        if record.exc_info:
            parts.append(f"exception={_value(self.formatException(record.exc_info))}")
        return " ".join(parts)


def configure_logging(process: str) -> None:
    """Sends this process's log to standard error, in one format; calling it again replaces the first call.

    Args:
        process: what this process is, such as ``router`` or ``worker-3``.

    Raises:
        ValueError: BATON_LOG_LEVEL is not a level.
    """
    level = os.environ.get("BATON_LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ValueError(
            f"BATON_LOG_LEVEL is {level!r}: set it to DEBUG, INFO, WARNING, ERROR or CRITICAL, or unset it"
        )
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h.formatter, _LineFormatter)]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(process))
    root.addHandler(handler)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN_VALUE.match(text) else _CONTROL.sub(_escape, json.dumps(text, ensure_ascii=False))


def _escape(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode("ascii")
