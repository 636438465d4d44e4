"""Routing policies by name."""

from __future__ import annotations

from core.errors import ConfigError
from router.policy import LeastLoadPolicy, PowerOfTwoPolicy, RandomPolicy, RoundRobinPolicy
from router.policy_predictive import PredictivePolicy
from router.routing import RoutingPolicy

_POLICIES = {
    "predictive": PredictivePolicy,
    "least_load": LeastLoadPolicy,
    "power_of_two": PowerOfTwoPolicy,
    "round_robin": RoundRobinPolicy,
    "random": RandomPolicy,
}
POLICY_NAMES = tuple(_POLICIES)
DEFAULT_POLICY = "predictive"
"""The one that serves."""


def make_policy(name: str, random_seed: int | None = None) -> RoutingPolicy:
    """
    Raises:
        ConfigError: there is no policy of this name.
    """
    if name not in _POLICIES:
        raise ConfigError(f"there is no routing policy {name!r}: choose {', '.join(POLICY_NAMES)}")
    return _POLICIES[name](random_seed)
