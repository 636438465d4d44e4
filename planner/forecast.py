"""From the load of now to the loads to decide for."""

from __future__ import annotations

from planner.demand import Forecast, Scenario
from planner.estimate import Estimate

SPREAD = 1.2
"""Scenarios beside the expected one lie this many standard errors away."""
SURGE = 1.5
"""One scenario has this much more of everything, so that splits with room on both sides win ties..."""
SURGE_WEIGHT = 0.08
"""...and is this likely."""


def short_term(load: Estimate) -> Forecast:
    """The load goes on as it is, as far as it is known."""
    rate = SPREAD * load.rate_error
    prompt, answer = SPREAD * load.prompt_error, SPREAD * load.answer_error
    factors = [
        (0.3, 1.0, 1.0),
        (0.1, 1.0 + rate, 1.0 + rate),
        (0.1, 1.0 - rate, 1.0 - rate),
        (0.125, 1.0 + prompt, 1.0),
        (0.125, 1.0 - prompt, 1.0),
        (0.125, 1.0, 1.0 + answer),
        (0.125, 1.0, 1.0 - answer),
    ]
    scenarios = [
        Scenario(
            weight=weight * (1.0 - SURGE_WEIGHT),
            prefill_factor=max(prefill, 0.1),
            decode_factor=max(decode, 0.1),
        )
        for weight, prefill, decode in factors
    ]
    scenarios.append(Scenario(weight=SURGE_WEIGHT, prefill_factor=SURGE, decode_factor=SURGE))
    return Forecast(demand=load.demand, scenarios=tuple(scenarios))
