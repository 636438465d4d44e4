"""How long engine steps and KV transfers take: the port the worker model asks, and linear fits of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.record import record


@record
class PrefillChunk:
    """The part of one prompt that one step computes."""

    context_tokens: int
    """KV tokens in front of the chunk: computed earlier, cached or pulled."""
    num_tokens: int
    ends_prompt: bool
    """True for a prompt's last chunk, the one that samples its next token."""


class StepTime(Protocol):
    """The duration of engine steps on one kind of worker."""

    def step_s(self, prefills: Sequence[PrefillChunk], num_decoding: int, decode_kv_tokens: int) -> float:
        """Seconds one step takes.

        Args:
            prefills: chunks of prompts in the step; chunks of one token count as decoding instead.
            num_decoding: sequences that add one token each.
            decode_kv_tokens: KV tokens those sequences hold together before the step.
        """
        ...

    def decode_ends_s(
        self, start_s: float, num_decoding: int, decode_kv_tokens: int, num_steps: int
    ) -> array[float]:
        """End times of consecutive pure decode steps, each with ``num_decoding`` more KV tokens.

        An override must add up to the same floats as ``step_s`` asked once a step.
        """
        ends_s = array("d")
        for _ in range(num_steps):
            start_s += self.step_s((), num_decoding, decode_kv_tokens)
            decode_kv_tokens += num_decoding
            ends_s.append(start_s)
        return ends_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearStepTime(StepTime):
    """Quadratic in prompt length, linear in batch and KV; one constant a step.

    A chunk of n tokens behind c context tokens costs what the quadratic gives for c + n less what it
    gives for c, so chunks of a prompt add up to the whole. A step pays ``prefill_base_ms`` if a prompt
    ends in it, else ``decode_base_ms``: a TTFT fit's constant belongs to a prompt, not to each of its
    chunks.
    """

    prefill_ms_per_token2: float
    prefill_ms_per_token: float
    prefill_base_ms: float
    decode_base_ms: float
    decode_ms_per_seq: float
    decode_ms_per_kv_token: float

    def step_s(self, prefills: Sequence[PrefillChunk], num_decoding: int, decode_kv_tokens: int) -> float:
        step_ms = self.decode_base_ms + self.decode_ms_per_seq * num_decoding
        step_ms += self.decode_ms_per_kv_token * decode_kv_tokens
        ends_prompt = False
        for chunk in prefills:
            context, num_tokens = chunk.context_tokens, chunk.num_tokens
            step_ms += self.prefill_ms_per_token2 * num_tokens * (2 * context + num_tokens)
            step_ms += self.prefill_ms_per_token * num_tokens
            ends_prompt |= chunk.ends_prompt
        if ends_prompt:
            step_ms += max(0.0, self.prefill_base_ms - self.decode_base_ms)
        return step_ms / 1e3

    def decode_ends_s(
        self, start_s: float, num_decoding: int, decode_kv_tokens: int, num_steps: int
    ) -> array[float]:
        batch_ms = self.decode_base_ms + self.decode_ms_per_seq * num_decoding
        per_kv_token_ms = self.decode_ms_per_kv_token
        last_kv_tokens = decode_kv_tokens + num_decoding * num_steps
        ends_s = array("d")
        for kv_tokens in range(decode_kv_tokens, last_kv_tokens, num_decoding):
            start_s += (batch_ms + per_kv_token_ms * kv_tokens) / 1e3
            ends_s.append(start_s)
        return ends_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledStepTime(StepTime):
    """Another step time, made slower or faster; a factor of 0 makes steps free."""

    step_time: StepTime
    factor: float

    def step_s(self, prefills: Sequence[PrefillChunk], num_decoding: int, decode_kv_tokens: int) -> float:
        return self.factor * self.step_time.step_s(prefills, num_decoding, decode_kv_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLink:
    """The way KV blocks take between two workers."""

    latency_s: float
    bytes_per_s: float

    def transfer_s(self, num_bytes: int) -> float:
        """Seconds ``num_bytes`` take when nothing else uses the link."""
        return self.latency_s + num_bytes / self.bytes_per_s


H200_LLAMA_8B_FP8 = LinearStepTime(
    prefill_ms_per_token2=4.21e-7,
    prefill_ms_per_token=0.01518,
    prefill_base_ms=16.50,
    decode_base_ms=4.677,
    decode_ms_per_seq=0.03812,
    decode_ms_per_kv_token=2.878e-5,
)
"""Llama-3.1-8B FP8 on one H200 with vLLM, TP1, least-squares fits of measured points.

Source: ai-dynamo/dynamo profiling results, Apache-2.0. TTFT was measured through a frontend, so the
prefill constant includes some serving overhead.
"""
