"""Answers that begin with given tokens: how an engine takes up one that another engine began.

A logits processor leaves one token to choose at each place of the beginning. The engine steps through it as
if it had sampled these tokens: a seed's random numbers are drawn, a grammar advances, penalties count.

vLLM has two model runners with a processor interface each: the first keeps rows that move about, the second
fixed slots and a view of the batch at each step.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as RowProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as SlotProcessor

REPLAY_ARG = "baton_replay_token_ids"
"""Key in ``SamplingParams.extra_args``."""


def replay_processor(config: Any) -> str | None:
    """The processor for an engine, as vLLM's ``logits_processors`` names it.

    Args:
        config: vLLM's VllmConfig.

    Returns:
        None where vLLM takes no processors: with speculative decoding.
    """
    if config.speculative_config is not None:
        return None
    cls = ReplayInSlots if config.use_v2_model_runner else ReplayInRows
    return f"{cls.__module__}:{cls.__qualname__}"


def _replayed(params: SamplingParams) -> list[int] | None:
    return (params.extra_args or {}).get(REPLAY_ARG)


class ReplayInRows(RowProcessor):
    """For vLLM's first model runner."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[list[int], list[int]]] = {}
        """Row to the tokens replayed and the request's output so far, a list that the runner fills."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._state)

    @staticmethod
    def _state(
        params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> tuple[list[int], list[int]] | None:
        replayed = _replayed(params)
        return (replayed, output) if replayed else None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._rows:
            return logits
        forced = {
            row: replayed[len(output)]
            for row, (replayed, output) in self._rows.items()
            if len(output) < len(replayed)
        }
        return _force(logits, list(forced), list(forced.values()))


class ReplayInSlots(SlotProcessor):
    """For vLLM's second model runner."""

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        self._prompt_len = req_states.prompt_len
        self._slots: dict[int, list[int]] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._slots.pop(req_idx, None)
        replayed = _replayed(sampling_params)
        if replayed:
            self._slots[req_idx] = replayed
        return bool(replayed)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        rows, tokens = [], []
        # Without speculative decoding each request has one row, and the bound is its length.
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            replayed = self._slots.get(slot)
            if replayed is None:
                continue
            place = int(ctx.seq_lens_upper_bound_np[row]) - int(self._prompt_len.np[slot])
            if 0 <= place < len(replayed):
                rows.append(row)
                tokens.append(replayed[place])
        return _force(logits, rows, tokens)


def _force(logits: torch.Tensor, rows: list[int], tokens: list[int]) -> torch.Tensor:
    """Leaves one token each to choose, in place."""
    if rows:
        logits[rows] = float("-inf")
        logits[rows, tokens] = 0.0
    return logits
