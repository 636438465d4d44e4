"""Versions of deployments: what is the same before and after a change of the application runs on.

``serve.run`` gives every deployment a version of its own making at each call, so that each call replaces
every replica. Serve takes a version from outside too, but only under a private flag; this is the one place
that uses it. Serve's own options (counts, resources, environment) are compared by Serve itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ray import serve

_SOURCES = (
    *("core", "telemetry", "engine", "kv_transfer", "router", "planner", "prefill_workers", "decode_workers"),
    *("simulator", "deploy", "proto/baton_proto", "baton_proto"),
)
"""Folders with Baton's code, in a checkout or installed."""


def bind_versioned(deployment: serve.Deployment, *args: Any) -> serve.Application:
    """Binds a deployment as ``bind`` does; equal arguments and equal code make an equal version.

    Args:
        args: plain values, dataclasses of such, and other bound deployments. Those are handles to the
            replica, which go by name: they are no part of the version.

    Raises:
        TypeError: an argument is of a kind that cannot be compared.
    """
    plain = [_plain(arg) for arg in args if not isinstance(arg, serve.Application)]
    digest = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16)
    digest.update(_code_digest())
    return deployment.options(version=digest.hexdigest(), _internal=True).bind(*args)


def _plain(value: Any) -> Any:
    """The same JSON for equal values in every process: sets and mappings have no order."""
    if value is None or isinstance(value, str | int | float | bool):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return sorted(([_plain(key), _plain(item)] for key, item in value.items()), key=json.dumps)
    if isinstance(value, Set):
        return sorted((_plain(item) for item in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    raise TypeError(f"cannot tell whether two {type(value).__name__} are equal in two processes")


@functools.cache
def _code_digest() -> bytes:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.blake2b(digest_size=16)
    for package in _SOURCES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.digest()
