"""Engine requests and deltas on the wire."""

from __future__ import annotations

import numpy as np

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens, unpack_tokens
from engine.base import EngineDelta, EngineRequest, KvParams, LogprobRows


def request_from_proto(message: worker_pb2.EngineRequest, kv_params: KvParams | None) -> EngineRequest:
    """
    Raises:
        ValueError: it has no id, no prompt or no token to make, or its tokens are not whole ones.
    """
    prompt_token_ids = unpack_tokens(message.prompt_token_ids)
    if not prompt_token_ids:
        raise ValueError("the prompt has no tokens")
    if not message.request_id:
        raise ValueError("the request has no id")
    if message.max_tokens < 1:
        raise ValueError("max_tokens must be at least 1")
    return EngineRequest(
        request_id=message.request_id,
        prompt_token_ids=prompt_token_ids,
        max_tokens=message.max_tokens,
        sampling_params=message.sampling_params,
        options=message.options,
        priority=message.priority,
        trace_headers=dict(message.trace_headers),
        kv_params=kv_params,
        replay_token_ids=unpack_tokens(message.replay_token_ids),
    )


def delta_to_proto(request_id: str, delta: EngineDelta) -> worker_pb2.Delta:
    """Everything but the KV parameters, which never leave the worker."""
    message = worker_pb2.Delta(request_id=request_id, token_ids=pack_tokens(delta.token_ids))
    if delta.logprobs is not None:
        message.logprobs.CopyFrom(_rows_to_proto(delta.logprobs))
    if delta.prompt_logprobs is not None:
        message.prompt_logprobs.CopyFrom(_rows_to_proto(delta.prompt_logprobs))
    if delta.num_cached_tokens is not None:
        message.num_cached_tokens = delta.num_cached_tokens
    if delta.num_cache_creation_tokens is not None:
        message.num_cache_creation_tokens = delta.num_cache_creation_tokens
    if delta.queue_s is not None:
        message.queue_s = delta.queue_s
    if delta.prefill_s is not None:
        message.prefill_s = delta.prefill_s
    if delta.finish_reason is not None:
        message.finish_reason = delta.finish_reason
    if isinstance(delta.stop_reason, int):
        message.stop_token_id = delta.stop_reason
    elif delta.stop_reason is not None:
        message.stop_string = delta.stop_reason
    return message


def delta_from_proto(message: worker_pb2.Delta) -> EngineDelta:
    stop_field = message.WhichOneof("stop_reason")
    return EngineDelta(
        token_ids=unpack_tokens(message.token_ids),
        logprobs=_rows_from_proto(message.logprobs) if message.HasField("logprobs") else None,
        prompt_logprobs=(
            _rows_from_proto(message.prompt_logprobs) if message.HasField("prompt_logprobs") else None
        ),
        num_cached_tokens=message.num_cached_tokens if message.HasField("num_cached_tokens") else None,
        num_cache_creation_tokens=(
            message.num_cache_creation_tokens if message.HasField("num_cache_creation_tokens") else None
        ),
        finish_reason=message.finish_reason or None,
        stop_reason=getattr(message, stop_field) if stop_field else None,
        queue_s=message.queue_s if message.HasField("queue_s") else None,
        prefill_s=message.prefill_s if message.HasField("prefill_s") else None,
    )


def _rows_to_proto(rows: LogprobRows) -> worker_pb2.LogprobRows:
    return worker_pb2.LogprobRows(
        width=rows.token_ids.shape[1],
        token_ids=rows.token_ids.astype("<i4").tobytes(),
        logprobs=rows.logprobs.astype("<f4").tobytes(),
        ranks=rows.ranks.astype("<i4").tobytes(),
    )


def _rows_from_proto(message: worker_pb2.LogprobRows) -> LogprobRows:
    shape = (-1, message.width) if message.width else (0, 0)
    return LogprobRows(
        token_ids=np.frombuffer(message.token_ids, dtype="<i4").reshape(shape),
        logprobs=np.frombuffer(message.logprobs, dtype="<f4").reshape(shape),
        ranks=np.frombuffer(message.ranks, dtype="<i4"),
    )
