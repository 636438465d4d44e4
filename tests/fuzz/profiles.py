"""How long a fuzz test looks for trouble: quickly, the same in every run, or thoroughly, by chance."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings

SEED = int(os.environ.get("BATON_FUZZ_SEED") or random.SystemRandom().randrange(1, 1 << 32))
"""Of the thorough tests; printed at the end of a run that has some."""

_SETTINGS: dict[str, Any] = {
    "deadline": None,  # an example waits for other threads: calls have limits of their own
    "database": None,
    "print_blob": True,
    # What an example leaves behind is in the way of the next one: a smaller one would not be the same.
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}


def quick(max_examples: int) -> Callable[[Any], Any]:
    """The same examples in every run."""
    return settings(max_examples=max_examples, derandomize=True, **_SETTINGS)


def thorough(max_examples: int) -> Callable[[Any], Any]:
    """Other examples in every run, from ``SEED``."""

    def decorate(test: Any) -> Any:
        test = settings(max_examples=max_examples, **_SETTINGS)(hypothesis.seed(SEED)(test))
        return pytest.mark.timeout(900)(pytest.mark.endurance(test))

    return decorate
