"""vLLM sampling parameters, as the relay needs them: facts for the path, parameters for each leg."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.sampling_params import SamplingParams

from engine.vllm_codec import encode_sampling_params
from router.disaggregation import SamplingFacts

SAFE_WITH_EARLY_TOKEN = frozenset(
    {
        # Act on one distribution at a time, whatever was generated before.
        *("temperature", "top_p", "top_k", "min_p", "logit_bias", "allowed_token_ids"),
        *("logprobs", "logprob_token_ids", "flat_logprobs"),
        # Looks at prompt and output alike.
        "repetition_penalty",
        # Counted or matched over the whole output by the router, or lowered by one for the decode leg.
        *("n", "max_tokens", "min_tokens", "stop", "include_stop_str_in_output", "output_text_buffer_length"),
        # Hold for each token alone.
        *("stop_token_ids", "ignore_eos", "_eos_token_id", "_all_stop_token_ids"),
        # Only about how output is presented.
        *("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind"),
        *("stream_interval", "skip_clone"),
    }
)
"""Fields that cannot make the answer depend on which leg produced the first token.

A field that is not listed here and is not at its default makes the relay take the safe path, so a
parameter that a later vLLM adds is safe before anybody has looked at it.
"""

_WHOLE_PROMPT = (
    "prompt_logprobs",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
    "skip_reading_prefix_cache",
    "trace_decode_token_ids",
    "routed_experts_prompt_start",
)
_DEFAULTS = SamplingParams()
_FIELDS = tuple(name for name in SamplingParams.__struct_fields__ if name not in ("extra_args", "seed"))


def facts_of(params: SamplingParams, num_siblings: int = 1, *, own_processors: bool = False) -> SamplingFacts:
    """What :func:`router.disaggregation.choose_path` needs, from one sequence's parameters.

    Args:
        own_processors: the engines run logits processors of the user's, which may look at anything.
    """
    unusual = {name for name in _FIELDS if _differs(getattr(params, name), getattr(_DEFAULTS, name))}
    seeded = params.seed is not None and params.temperature > 0
    return SamplingFacts(
        max_tokens=params.max_tokens or 1,
        num_siblings=num_siblings,
        needs_whole_prompt=any(name in unusual for name in _WHOLE_PROMPT),
        depends_on_output_history=bool(unusual - SAFE_WITH_EARLY_TOKEN)
        or bool(params.extra_args)
        or seeded
        or own_processors,
    )


def _differs(value: object, default: object) -> bool:
    if value is None or default is None:
        return value is not default and bool(value)
    return bool(value != default)


@dataclass(frozen=True, slots=True)
class LegParams:
    """Encoded sampling parameters of one leg."""

    encoded: bytes
    max_tokens: int


def local_leg(params: SamplingParams) -> LegParams:
    """One worker runs it all; stop strings stay with the router, which has the text."""
    return _leg(params, params.max_tokens or 1)


def early_prefill_leg(params: SamplingParams) -> LegParams:
    """Samples the token the client will see first."""
    return _leg(params, 1)


def kv_only_prefill_leg() -> LegParams:
    """Only the KV is wanted; the sampled token is thrown away and must not end the request."""
    return _leg(SamplingParams(temperature=0.0, ignore_eos=True), 1)


def after_first_token_leg(params: SamplingParams) -> LegParams:
    """Goes on after a first token that has become part of the prompt."""
    rest = rest_params(params, 1)
    return _leg(rest, rest.max_tokens or 1)


def rest_params(params: SamplingParams, num_sent: int) -> SamplingParams:
    """Of an answer whose first ``num_sent`` tokens have become part of the prompt."""
    rest = params.clone()
    rest.n = 1
    rest.max_tokens = (params.max_tokens or 1) - num_sent
    rest.min_tokens = max(params.min_tokens - num_sent, 0)
    return rest


def _leg(params: SamplingParams, max_tokens: int) -> LegParams:
    leg = params.clone()
    leg.n = 1
    leg.stop = []
    leg.max_tokens = max_tokens
    leg.min_tokens = min(leg.min_tokens, max_tokens)
    leg.output_text_buffer_length = 0
    return LegParams(encode_sampling_params(leg), max_tokens)
