"""Packed token arrays and loads: the parts of the wire format that are not one field each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from baton_proto import worker_pb2
from core.types import WorkerLoad

TOKEN_BYTES = 4


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32."""
    return np.asarray(token_ids, dtype="<u4").tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """
    Raises:
        ValueError: ``data`` is not a whole number of tokens.
    """
    return np.frombuffer(data, dtype="<u4").tolist()


def load_to_proto(load: WorkerLoad) -> worker_pb2.Load:
    return worker_pb2.Load(
        num_running=load.num_running,
        num_decoding=load.num_decoding,
        num_waiting=load.num_waiting,
        waiting_prefill_tokens=load.waiting_prefill_tokens,
        kv_used_blocks=load.kv_used_blocks,
        num_pinned=load.num_pinned,
    )


def load_from_proto(message: worker_pb2.Load) -> WorkerLoad:
    return WorkerLoad(
        num_running=message.num_running,
        num_decoding=message.num_decoding,
        num_waiting=message.num_waiting,
        waiting_prefill_tokens=message.waiting_prefill_tokens,
        kv_used_blocks=message.kv_used_blocks,
        num_pinned=message.num_pinned,
    )
