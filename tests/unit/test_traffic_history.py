"""What came between two looks, whatever happens to routers and clocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.traffic import TrafficSummary
from planner.observation import ObservedRouter
from planner.traffic_history import KEPT_S, MAX_GAP_S, TrafficHistory
from router.traffic_counter import TrafficCounter


class Router:
    """One that is told how many requests come."""

    def __init__(self, router_id: str = "r") -> None:
        self.counter = TrafficCounter(router_id)

    def get(self, num_requests: int) -> None:
        for _ in range(num_requests):
            self.counter.arrived(1000)
            self.counter.placed(1000, 400)
            self.counter.tokens(1000, 0, 20)
            self.counter.finished(20, ttft_met=True, tpot_met=True)

    @property
    def summary(self) -> TrafficSummary:
        return self.counter.summary(num_waiting=0, waiting_prompt_tokens=0, num_ongoing=0)

    def __call__(self) -> ObservedRouter:
        return ObservedRouter(traffic=self.summary)


def arrived(history: TrafficHistory) -> list[int]:
    return [sample.num_arrived for sample in history.samples]


@pytest.fixture
def history() -> TrafficHistory:
    return TrafficHistory()


def test_a_sample_holds_what_came_between_two_looks(history: TrafficHistory) -> None:
    router = Router()
    router.get(100)  # before anybody looked
    history.observe(10.0, [router()])
    router.get(3)
    history.observe(11.5, [router()])
    (sample,) = history.samples
    assert (sample.num_arrived, sample.seconds, sample.end_s) == (3, 1.5, 11.5)
    assert sample.prompts.sum(axis=1).tolist() == [3, 3000, 3000, 1200]
    assert sample.answers[1:].sum(axis=1).tolist() == [3, 60]


def test_a_summary_seen_twice_counts_once_and_a_lost_one_loses_nothing(history: TrafficHistory) -> None:
    router = Router()
    history.observe(0.0, [router()])
    router.get(2)
    for now_s in (1.0, 2.0):
        history.observe(now_s, [router()])
    router.get(5)  # told
    router.get(1)  # told with what came before
    history.observe(3.0, [router()])
    assert arrived(history) == [2, 0, 6]


def test_a_router_that_starts_again_is_another_one(history: TrafficHistory) -> None:
    first = Router("r-1")
    history.observe(0.0, [first()])
    first.get(4)
    history.observe(1.0, [first()])
    second = Router("r-2")
    second.get(7)
    history.observe(2.0, [second()])
    second.get(5)
    history.observe(3.0, [second()])
    assert arrived(history) == [4, 5]


def test_counts_that_fall_under_the_same_name_are_left_out_once(history: TrafficHistory) -> None:
    router, other = Router(), Router("other")
    router.get(50)
    history.observe(0.0, [router(), other()])
    again = Router()
    again.get(2)
    other.get(3)
    history.observe(1.0, [again(), other()])
    again.get(4)
    history.observe(2.0, [again(), other()])
    assert arrived(history) == [3, 4]


def test_routers_that_come_and_go_add_up(history: TrafficHistory) -> None:
    one, two = Router("1"), Router("2")
    history.observe(0.0, [one()])
    one.get(1)
    two.get(100)
    history.observe(1.0, [one(), two()])
    one.get(1)
    two.get(2)
    history.observe(2.0, [one(), two()])
    two.get(2)
    history.observe(3.0, [two()])
    assert arrived(history) == [1, 3, 2]


def test_a_time_of_which_nobody_tells_is_not_a_time_without_requests(history: TrafficHistory) -> None:
    router = Router()
    history.observe(0.0, [router()])
    for now_s in range(1, 9):
        history.observe(float(now_s), [])
    router.get(30)
    history.observe(9.0, [router()])
    (sample,) = history.samples
    assert (sample.num_arrived, sample.seconds) == (30, 9.0)


def test_after_a_long_gap_it_begins_anew(history: TrafficHistory) -> None:
    router = Router()
    for now_s in range(5):
        history.observe(float(now_s), [router()])
    router.get(1000)
    history.observe(5.0 + MAX_GAP_S, [router()])
    assert arrived(history) == []
    router.get(2)
    history.observe(6.0 + MAX_GAP_S, [router()])
    assert arrived(history) == [2]


@pytest.mark.parametrize("jump_s", [-1e9, -100.0, -1.0, 31.0, 1e9, float("nan")])
def test_a_clock_that_jumps_costs_the_history_and_nothing_else(
    history: TrafficHistory, jump_s: float
) -> None:
    router = Router()
    for now_s in range(5):
        router.get(2)
        history.observe(100.0 + now_s, [router()])
    router.get(500)
    history.observe(104.0 + jump_s, [router()])
    assert arrived(history) == []
    start_s = 104.0 + jump_s if jump_s == jump_s else 200.0
    for now_s in range(1, 4):
        router.get(3)
        history.observe(start_s + now_s, [router()])
    assert arrived(history)[-2:] == [3, 3]


def test_only_the_last_minutes_are_kept(history: TrafficHistory) -> None:
    router = Router()
    for now_s in range(0, 1500, 10):
        history.observe(float(now_s), [router()])
    assert history.samples[-1].end_s - history.samples[0].end_s <= KEPT_S


IMPOSSIBLE = {
    "tokens without requests": {"prompt_tokens": (10**9,) * 26},
    "more requests than there can be": {"num_arrived": (10**12,) * 26},
    "longer prompts than their class": {"num_arrived": (1,) * 26, "prompt_tokens": (10**8,) * 26},
    "more cached than sent": {"cached_tokens": (10**6,) * 26},
    "longer answers than their class": {"num_ended": (1,) * 28, "ended_tokens": (10**7,) * 28},
}


@pytest.mark.parametrize("absurd", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_counts_that_cannot_be_are_left_out(
    history: TrafficHistory, absurd: dict[str, tuple[int, ...]]
) -> None:
    router, liar = Router(), Router("liar")
    history.observe(0.0, [router(), liar()])
    router.get(4)
    history.observe(1.0, [router(), ObservedRouter(traffic=replace(liar.summary, **absurd))])
    router.get(5)
    history.observe(2.0, [router(), liar()])
    router.get(6)
    liar.get(1)
    history.observe(3.0, [router(), liar()])
    assert arrived(history) == [4, 5, 7]
    assert history.samples[0].prompts[1].sum() == 4000
