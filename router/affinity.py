"""Which worker a session prefers: the same one on every router, without anybody remembering it."""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

_GOLDEN, _WORD = 0x9E3779B1, 1 << 32


def preferred(session: str, worker_ids: Iterable[str]) -> str:
    """The worker with the highest hash of session and id (rendezvous hashing).

    When a worker goes, only its own sessions move; when one comes, it takes its share of everybody's.

    Raises:
        ValueError: there are no workers.
    """
    # A CRC alone is linear: all sessions would rank the workers alike but for a few bits.
    return max(
        worker_ids,
        key=lambda worker_id: crc32(f"{session}\0{worker_id}".encode()) * _GOLDEN % _WORD,
    )
