"""Writes a trace so that other tools can read it, and ``read_trace`` gives back the same floats."""

from __future__ import annotations

import gzip
from decimal import Decimal
from pathlib import Path

from core.errors import ConfigError
from simulator.traces.hashes import MOONCAKE_BLOCK_TOKENS
from simulator.traces.readers import EXACT
from simulator.traces.trace import Trace


def write_trace(trace: Trace, path: Path) -> None:
    """Writes Mooncake's JSONL, gzipped if the name ends in ``.gz``; the name of the trace is the file's.

    ``timestamp`` is in ms with every digit of the float in seconds. Two keys are not Mooncake's:
    ``hash_block_tokens`` where a piece is not 512 tokens, and ``exact_arrivals`` in the first line.

    Raises:
        core.errors.ConfigError: the trace is empty, or the file cannot be written.
    """
    if not trace.requests:
        raise ConfigError(f"trace {trace.name!r} has no requests to write to {path}")
    size = trace.hash_block_tokens
    more = f', "hash_block_tokens": {size}' if size != MOONCAKE_BLOCK_TOKENS else ""
    lines = []
    for request in trace.requests:
        hash_ids = ", ".join(map(str, request.block_hashes))
        lines.append(
            f'{{"timestamp": {_milliseconds(request.arrival_s)}, "input_length": {request.prompt_tokens}, '
            f'"output_length": {request.output_tokens}, "hash_ids": [{hash_ids}]{more}}}\n'
        )
    lines[0] = lines[0].replace("}", f', "{EXACT}": true}}')
    data = "".join(lines).encode()
    try:
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _milliseconds(time_s: float) -> str:
    """The shortest decimal that names the float, three places to the left."""
    return f"{Decimal(repr(float(time_s))).scaleb(3):f}"
