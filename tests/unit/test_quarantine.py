"""Quarantine: which workers and nodes are not trusted, and who is never given up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.clock import ManualClock
from core.types import Role
from planner.quarantine import (
    DEATHS_WINDOW_S,
    LONGEST_DELAY_S,
    OPENINGS,
    OPENINGS_WINDOW_S,
    Quarantine,
)
from tests.unit.test_registry import report

WORKERS = [report(worker_id, role_assigned=True) for worker_id in "123"]
BAD = WORKERS[0].incarnation


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def quarantine(clock: ManualClock) -> Quarantine:
    return Quarantine(clock)


def complain(
    quarantine: Quarantine, clock: ManualClock, *routers: str, suspect: str = BAD, times: int = OPENINGS
) -> None:
    """Routers that have known the worker for long say, second by second, that its breaker opened."""
    for count in range(times + 1):
        for router_id in routers:
            quarantine.router_heard(router_id, {suspect: count})
        clock.advance(1.0)


def test_a_worker_that_a_router_stops_sending_to_again_and_again_is_quarantined(
    quarantine: Quarantine, clock: ManualClock
) -> None:
    complain(quarantine, clock, "a", times=OPENINGS - 1)
    assert not quarantine.review(WORKERS)
    quarantine.router_heard("a", {BAD: OPENINGS})
    assert list(quarantine.review(WORKERS)) == [BAD]
    clock.advance(10 * OPENINGS_WINDOW_S)
    assert list(quarantine.review(WORKERS)) == [BAD], "who is in quarantine stays there"
    assert not quarantine.review(WORKERS[1:])
    assert not quarantine.review(WORKERS), "a worker that has gone starts anew"


def test_failures_far_apart_are_forgiven(quarantine: Quarantine, clock: ManualClock) -> None:
    for count in range(2 * OPENINGS):
        quarantine.router_heard("a", {BAD: count})
        clock.advance(OPENINGS_WINDOW_S / (OPENINGS - 1))
        assert not quarantine.review(WORKERS)


def test_it_takes_half_of_the_routers(quarantine: Quarantine, clock: ManualClock) -> None:
    for router_id in "bcd":
        quarantine.router_heard(router_id, {})
    complain(quarantine, clock, "a")
    assert not quarantine.review(WORKERS)
    complain(quarantine, clock, "b")
    assert list(quarantine.review(WORKERS)) == [BAD]


def test_what_a_router_counted_before_this_registry_started_is_not_news(
    quarantine: Quarantine, clock: ManualClock
) -> None:
    quarantine.router_heard("a", {BAD: 50})
    assert not quarantine.review(WORKERS)


def test_a_worker_that_is_leaving_anyway_is_left_alone(quarantine: Quarantine, clock: ManualClock) -> None:
    complain(quarantine, clock, "a")
    assert not quarantine.review([replace(WORKERS[0], draining=True), *WORKERS[1:]])


def test_what_a_router_said_leaves_with_it(quarantine: Quarantine, clock: ManualClock) -> None:
    complain(quarantine, clock, "a")
    quarantine.router_left("a")
    assert not quarantine.review(WORKERS)


def test_one_worker_of_a_model_at_a_time(quarantine: Quarantine, clock: ManualClock) -> None:
    for worker in WORKERS:
        complain(quarantine, clock, "a", suspect=worker.incarnation)
    assert list(quarantine.review(WORKERS)) == [BAD]
    assert list(quarantine.review(WORKERS[1:])) == [WORKERS[1].incarnation]


@pytest.mark.parametrize(
    "others",
    [
        [],
        [report("2", draining=True)],
        [report("2", trouble="its engine does not answer")],
        [report("2", allowed_roles=frozenset({Role.PREFILL}))],
        [report("2", model="another")],
    ],
    ids=["alone", "draining", "in trouble", "only prefills", "other model"],
)
def test_the_last_worker_that_could_decode_is_never_given_up(
    quarantine: Quarantine, clock: ManualClock, others: list[object]
) -> None:
    complain(quarantine, clock, "a")
    assert not quarantine.review([WORKERS[0], *others])


def test_a_node_on_which_workers_keep_dying_is_shown_for_a_while(
    quarantine: Quarantine, clock: ManualClock
) -> None:
    for number in range(3):
        assert quarantine.suspect_nodes() == ()
        quarantine.died("s", "n", f"reason {number}", lived_s=1000.0)
        clock.advance(10.0)
    quarantine.died("s", "other", "reason", lived_s=1000.0)
    (node,) = quarantine.suspect_nodes()
    assert (node.shape, node.node_id, node.num_deaths, node.last_reason) == ("s", "n", 3, "reason 2")
    clock.advance(DEATHS_WINDOW_S)
    assert quarantine.suspect_nodes() == ()


def test_workers_that_die_early_are_started_ever_more_slowly(quarantine: Quarantine) -> None:
    delays_s = []
    for _ in range(8):
        quarantine.died("s", "n", "it could not start", lived_s=0.0)
        delays_s.append(quarantine.start_delay_s("s", "n"))
    assert delays_s == [0, 0, 1, 2, 4, 8, LONGEST_DELAY_S, LONGEST_DELAY_S]
    assert quarantine.start_delay_s("s", "other") == 0


def test_workers_that_lived_long_are_replaced_at_once(quarantine: Quarantine) -> None:
    for _ in range(8):
        quarantine.died("s", "n", "it fell silent", lived_s=60.0)
    assert quarantine.start_delay_s("s", "n") == 0
