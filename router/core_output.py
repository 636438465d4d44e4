"""A worker's delta as vLLM's output processor expects it from an engine core."""

from __future__ import annotations

import torch
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from engine.base import EngineDelta, LogprobRows

_FINISH_REASONS = {str(reason): reason for reason in FinishReason}


def core_output(core_id: str, delta: EngineDelta) -> EngineCoreOutput:
    prefill_stats = None
    if delta.num_cached_tokens is not None:
        prefill_stats = PrefillStats(
            num_cached_tokens=delta.num_cached_tokens,
            num_cache_creation_tokens=delta.num_cache_creation_tokens or 0,
        )
    prompt = delta.prompt_logprobs
    return EngineCoreOutput(
        request_id=core_id,
        new_token_ids=list(delta.token_ids),
        new_logprobs=_lists(delta.logprobs) if delta.logprobs is not None else None,
        new_prompt_logprobs_tensors=_tensors(prompt) if prompt is not None else None,
        finish_reason=_FINISH_REASONS[delta.finish_reason] if delta.finish_reason else None,
        stop_reason=delta.stop_reason,
        prefill_stats=prefill_stats,
    )


def _lists(rows: LogprobRows) -> LogprobsLists:
    return LogprobsLists(rows.token_ids, rows.logprobs, rows.ranks)


def _tensors(rows: LogprobRows) -> LogprobsTensors:
    return LogprobsTensors(
        *(torch.from_numpy(array.copy()) for array in (rows.token_ids, rows.logprobs, rows.ranks))
    )
