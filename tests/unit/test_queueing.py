"""The formula for lost requests, against exact ones and against queues that are played through."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.queueing import lost_share

POISSON = 2.0
"""ca2 + cs2 of an M/M/c queue."""


def lost(utilisation: float, num_servers: float, slack: float, variation: float = POISSON) -> float:
    """The formula for one queue."""
    share = lost_share(np.array([utilisation]), np.array([num_servers]), np.array([slack]), variation)
    return float(share[0])


def erlang_b(num_servers: int, offered: float) -> float:
    blocked = 1.0
    for num in range(1, num_servers + 1):
        blocked = offered * blocked / (num + offered * blocked)
    return blocked


def exactly_lost(utilisation: float, num_servers: int, slack: float) -> float:
    """Of M/M/c with constant patience; slack in mean service times, utilisation not 1."""
    blocked = erlang_b(num_servers, utilisation * num_servers)
    waits = blocked / (1.0 - utilisation * (1.0 - blocked))
    late = waits * math.exp(min(-num_servers * (1.0 - utilisation) * slack, 100.0))
    return (1.0 - utilisation) * late / (1.0 - utilisation * late)


def played_lost(utilisation: float, num_servers: int, slack: float, num: int = 60_000) -> float:
    """Of as many requests, each of which goes away if no server will be free in time for it."""
    rng = np.random.default_rng(num_servers)
    arrivals_s = np.cumsum(rng.exponential(1.0 / (utilisation * num_servers), num)).tolist()
    services_s = rng.exponential(1.0, num).tolist()
    free_at_s, num_lost = [0.0] * num_servers, 0
    for at_s, service_s in zip(arrivals_s, services_s, strict=True):
        starts_s = max(free_at_s[0], at_s)
        if starts_s - at_s > slack:
            num_lost += 1
        else:
            heapq.heapreplace(free_at_s, starts_s + service_s)
    return num_lost / num


@pytest.mark.parametrize("utilisation", [0.2, 0.8, 0.95, 1.05, 1.5, 4.0])
@pytest.mark.parametrize("slack", [0.0, 0.5, 3.0])
def test_one_server_is_exact(utilisation: float, slack: float) -> None:
    assert lost(utilisation, 1, slack) == pytest.approx(exactly_lost(utilisation, 1, slack), rel=1e-6)


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8, 0.95, 1.1, 1.5, 3.0])
@pytest.mark.parametrize("num_servers", [2, 4, 16, 100])
@pytest.mark.parametrize("slack", [0.0, 0.1, 1.0, 5.0])
def test_more_servers_are_near_the_exact_formula(utilisation: float, num_servers: int, slack: float) -> None:
    assert lost(utilisation, num_servers, slack) == pytest.approx(
        exactly_lost(utilisation, num_servers, slack), abs=0.04
    )


@pytest.mark.parametrize(
    ("utilisation", "num_servers", "slack"), [(0.7, 1, 1.0), (0.9, 4, 0.5), (1.0, 4, 1.0), (1.3, 8, 0.3)]
)
def test_it_agrees_with_a_queue_that_is_played_through(
    utilisation: float, num_servers: int, slack: float
) -> None:
    played = played_lost(utilisation, num_servers, slack)
    assert lost(utilisation, num_servers, slack) == pytest.approx(played, abs=0.02)


@pytest.mark.parametrize("slack", [0.0, 0.02, 1.0, 20.0])
@pytest.mark.parametrize("num_servers", [0.5, 1.0, 6.0, 50.0])
def test_nothing_jumps_where_work_comes_as_fast_as_it_can_be_done(num_servers: float, slack: float) -> None:
    below, at, above = (lost(rho, num_servers, slack) for rho in (1 - 1e-5, 1.0, 1 + 1e-5))
    assert below == pytest.approx(at, abs=1e-3)
    assert above == pytest.approx(at, abs=1e-3)


def test_far_beyond_capacity_the_excess_is_lost() -> None:
    assert lost(10.0, 4, 2.0) == pytest.approx(0.9, abs=1e-6)
    assert lost(1e9, 4, 2.0) == pytest.approx(1.0, abs=1e-6)
    assert lost(1e-9, 4, 2.0) == pytest.approx(0.0, abs=1e-6)


def test_without_time_to_wait_everything_is_late() -> None:
    assert lost(0.01, 10, -0.001) == 1.0


sane = st.floats(0.0, 1e12)
servers = st.floats(1e-9, 1e4)
slacks = st.floats(0.0, 1e6)
variations = st.floats(1.0, 100.0)


@given(st.lists(st.tuples(sane, servers, st.floats(-1e6, 1e6), variations), min_size=1, max_size=20))
def test_it_is_a_share_whatever_the_queue(queues: list[tuple[float, float, float, float]]) -> None:
    shares = lost_share(*(np.array(column) for column in zip(*queues, strict=True)))
    assert np.isfinite(shares).all()
    assert ((shares >= 0.0) & (shares <= 1.0)).all()


@settings(max_examples=200)
@given(st.floats(0.01, 20.0), st.floats(0.5, 200.0), st.floats(0.0, 50.0), variations, st.floats(1.001, 5.0))
def test_more_work_loses_more_and_more_time_less(
    utilisation: float, num_servers: float, slack: float, variation: float, factor: float
) -> None:
    base = lost(utilisation, num_servers, slack, variation)
    tolerance = 1e-4
    assert lost(utilisation * factor, num_servers, slack, variation) >= base - tolerance
    assert lost(utilisation, num_servers, slack * factor, variation) <= base + tolerance
    assert lost(utilisation, num_servers * factor, slack, variation) <= base + tolerance
    assert lost(utilisation, num_servers, slack, variation * factor) >= base - tolerance
