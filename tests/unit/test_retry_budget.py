"""Retry budgets and circuit breakers, in made-up time."""

from __future__ import annotations

import pytest

from core.clock import ManualClock
from router.circuit_breaker import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, CircuitBreaker
from router.retry_budget import RetryBudget, Tries


def drained(clock: ManualClock) -> RetryBudget:
    budget = RetryBudget(clock)
    while budget.grant(1):
        pass
    return budget


def test_every_request_may_be_begun_anew_once() -> None:
    budget = drained(ManualClock())
    assert all(budget.grant(0) for _ in range(1000))
    assert not budget.grant(1)


def test_further_retries_are_a_share_of_the_requests() -> None:
    budget = drained(ManualClock())
    for _ in range(50):
        budget.began()
    assert sum(budget.grant(1) for _ in range(50)) in (9, 10)  # a fifth each, in binary


def test_what_is_not_used_comes_back_with_time_up_to_a_limit() -> None:
    clock = ManualClock()
    budget = drained(clock)
    clock.advance(3600.0)
    assert 10 < sum(budget.grant(2) for _ in range(1000)) < 100


def test_a_request_may_fail_so_often_and_is_never_sent_back() -> None:
    tries = Tries(RetryBudget(ManualClock()), limit=2)
    assert [tries.failed(worker) for worker in "abc"] == [True, True, False]
    assert tries.excluded == ["a", "b", "c"]


def test_who_is_asked_again_when_nobody_else_is_there() -> None:
    tries = Tries(RetryBudget(ManualClock()), limit=9)
    tries.failed("lost")
    tries.failed("silent", silent=True)
    tries.refused("full")
    assert set(tries.excluded) == {"lost", "silent", "full"}
    tries.forgive()
    assert tries.excluded == ["silent"]
    tries.forgive(silent_too=True)
    assert tries.excluded == []


def test_an_answer_that_grew_before_each_loss_does_not_draw_on_the_budget() -> None:
    clock = ManualClock()
    grows = Tries(drained(clock), limit=5)
    assert [grows.failed("w", progressed=True) for _ in range(6)] == [True] * 5 + [False]
    stands = Tries(drained(clock), limit=5)
    assert [stands.failed("w") for _ in range(2)] == [True, False]


def opened(clock: ManualClock) -> CircuitBreaker:
    breaker = CircuitBreaker(clock)
    for _ in range(FAILURES):
        assert not breaker.is_open
        breaker.failed()
    return breaker


def test_a_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = CircuitBreaker(ManualClock())
    for _ in range(20):
        breaker.failed()
        breaker.succeeded()
    assert not breaker.is_open
    assert opened(ManualClock()).is_open


def test_failures_of_requests_that_ran_together_open_it_once() -> None:
    breaker = opened(ManualClock())
    for _ in range(200):
        breaker.failed()
    assert breaker.num_opened == 1


def test_after_a_pause_one_request_tries() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(FIRST_PAUSE_S)
    assert not breaker.is_open
    breaker.chosen()
    assert breaker.is_open
    breaker.answered()
    assert not breaker.is_open


def test_a_trial_that_fails_doubles_the_pause_up_to_the_longest() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    pauses = []
    for _ in range(10):
        since_s = clock.now_s()
        while breaker.is_open:
            clock.advance(0.25)
        pauses.append(clock.now_s() - since_s)
        breaker.chosen()
        clock.advance(0.05)
        breaker.failed()
    assert pauses[:4] == pytest.approx([1.0, 2.0, 4.0, 8.0], abs=0.3)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S, abs=0.3)
    assert breaker.num_opened == 11


def test_a_worker_that_answers_and_never_ends_is_left_alone_in_the_end() -> None:
    breaker = CircuitBreaker(ManualClock())
    for _ in range(FAILURES):
        breaker.answered()
        breaker.failed()
    assert breaker.is_open


def test_a_trial_that_was_cancelled_is_followed_by_another() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(FIRST_PAUSE_S)
    breaker.chosen()
    clock.advance(FIRST_PAUSE_S)
    assert not breaker.is_open
