"""What Ray makes of an exception, undone: the error itself out of a traceback through several processes."""

from __future__ import annotations

import re

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ERROR_LINE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit): ", re.MULTILINE)


def essence(message: str) -> str:
    """The last error in a message, up to an empty line; the whole message if there is no error in it."""
    message = _ANSI.sub("", message).strip()
    found = list(_ERROR_LINE.finditer(message))
    if "Traceback (most recent call last)" not in message and not found:
        return message
    error = message[found[-1].start() :] if found else message.splitlines()[-1]
    name, _, text = error.split("\n\n")[0].partition(": ")
    return f"{name.rpartition('.')[2]}: {text}" if text else name
