"""What requests ask of the workers: how many come, how long their prompts and answers are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptKind:
    """Prompts of about one length."""

    new_tokens: float
    """Tokens that no cache holds."""
    cached_tokens: float
    share: float
    """Of all requests, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A load, as it is or is expected to be. Shares of ``prompts`` add up to 1."""

    rate_rps: float
    prompts: tuple[PromptKind, ...]
    output_tokens: float
    """Mean tokens of an answer."""
    kv_tokens: float | None = None
    """Mean tokens in front of an output token, prompt and answer; None: as if lengths of prompts and answers
    had nothing to do with each other."""
    arrival_dispersion: float = 1.0
    """Variance of arrivals in a second over their mean: 1 for Poisson arrivals, more for bursts."""

    @property
    def prompt_tokens(self) -> float:
        """Mean tokens of a prompt, cached ones among them."""
        return sum(kind.share * (kind.new_tokens + kind.cached_tokens) for kind in self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One way the load may turn out, against the demand it is expected to be."""

    weight: float
    """How likely it is beside the others; weights add up to 1."""
    prefill_factor: float
    """Prompt work, and requests that bring it, as a multiple of what is expected."""
    decode_factor: float
    """Work of decoding, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The load to decide for."""

    demand: Demand
    scenarios: tuple[Scenario, ...] = (Scenario(weight=1.0, prefill_factor=1.0, decode_factor=1.0),)
