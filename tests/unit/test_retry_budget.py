"""Retry budgets and circuit breakers, in made-up time."""

from __future__ import annotations

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


def test_a_refusal_is_forgotten_a_failure_is_not() -> None:
    tries = Tries(RetryBudget(ManualClock()), limit=2)
    assert tries.failed("a")
    assert tries.refused("b")
    tries.forget_refusals()
    assert tries.excluded == ["a"]


def test_refusals_end_too() -> None:
    tries = Tries(RetryBudget(ManualClock()), limit=2)
    assert not all(tries.refused("a") for _ in range(100))


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
    breaker.sent()
    assert breaker.is_open
    breaker.succeeded()
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
        breaker.failed()
    assert pauses[:4] == [1.0, 2.0, 4.0, 8.0]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_a_trial_that_was_cancelled_is_followed_by_another() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(FIRST_PAUSE_S)
    breaker.sent()
    clock.advance(FIRST_PAUSE_S)
    assert not breaker.is_open
