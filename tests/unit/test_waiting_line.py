"""The order of the waiting line: classes with ageing, fair shares, deadlines."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from router.drain_rate import DrainRate
from router.waiting_line import Entry, WaitingLine

QUANTUM = 1.0
AGING_S = 10.0


def line(**weights: float) -> WaitingLine[str]:
    return WaitingLine(aging_s=AGING_S, quantum=QUANTUM, weights=weights)


def entry(
    item: str, *, tenant: str = "", priority: int = 0, deadline_s: float = 0.0, work: float = 1.0
) -> Entry[str]:
    return Entry(item=item, tenant=tenant, priority=priority, deadline_s=deadline_s, work=work)


def drain(what: WaitingLine[str]) -> list[str]:
    sent = []
    while what:
        first = next(what.in_order())
        what.remove(first, sent=True)
        sent.append(first.item)
    return sent


entries = st.lists(
    st.builds(
        entry,
        st.just(""),
        tenant=st.sampled_from("abc"),
        priority=st.integers(-2, 2),
        deadline_s=st.floats(0, 100),
        work=st.floats(0, 5),
    ),
    max_size=40,
)


def test_lower_priority_values_go_first_then_earlier_deadlines_then_arrival() -> None:
    waiting = line()
    for item in (
        entry("late", deadline_s=9.0),
        entry("soon", deadline_s=1.0),
        entry("urgent", priority=-1, deadline_s=50.0),
        entry("soon too", deadline_s=1.0),
        entry("batch", priority=1, deadline_s=0.0),
    ):
        waiting.add(item, 0.0)

    assert drain(waiting) == ["urgent", "soon", "soon too", "late", "batch"]


def test_one_that_waits_moves_up_a_class_every_so_often_without_end() -> None:
    waiting = line()
    old = entry("old", priority=2, deadline_s=99.0)
    waiting.add(old, 0.0)
    waiting.age(AGING_S - 0.1)
    assert old.priority == 2
    waiting.age(3 * AGING_S)
    assert old.priority == -1
    waiting.add(entry("new", priority=0), 3 * AGING_S)

    assert drain(waiting) == ["old", "new"]


@given(late_by_s=st.floats(0.001, 100), priority=st.integers(0, 4), deadline_s=st.floats(0, 1000))
def test_nothing_much_younger_is_ever_in_front(late_by_s: float, priority: int, deadline_s: float) -> None:
    """The bound against starvation: (p - q + 1) times the ageing time."""
    waiting = line()
    old = entry("old", priority=priority, deadline_s=1000.0)
    waiting.add(old, 0.0)
    bound_s = (priority + 1) * AGING_S
    arrives_s = bound_s + late_by_s
    waiting.age(arrives_s)
    waiting.add(entry("young", priority=0, tenant="other", deadline_s=deadline_s), arrives_s)
    for later_s in (0.0, 0.5 * AGING_S, AGING_S, 7.3 * AGING_S):
        waiting.age(arrives_s + later_s)
        assert next(waiting.in_order()) is old


def test_a_tenant_with_little_to_do_does_not_wait_behind_one_with_much() -> None:
    waiting = line()
    for number in range(50):
        waiting.add(entry("much", tenant="much", deadline_s=float(number)), 0.0)
    for number in range(5):
        waiting.add(entry("little", tenant="little", deadline_s=100.0 + number), 0.0)

    sent = drain(waiting)

    assert sent[:12].count("little") == 5


def test_shares_follow_the_weights() -> None:
    waiting = line(heavy=3.0)
    for number in range(100):
        waiting.add(entry("heavy", tenant="heavy", deadline_s=float(number)), 0.0)
        waiting.add(entry("light", tenant="light", deadline_s=float(number)), 0.0)

    assert 28 <= drain(waiting)[:40].count("heavy") <= 32


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.floats(0.1, 3.0))
def test_backlogged_tenants_are_served_level(tenants: list[str], work: float) -> None:
    """Of any two that still wait, neither is ahead by more than a quantum and a request."""
    waiting = line()
    for number, tenant in enumerate(tenants):
        waiting.add(entry(tenant, tenant=tenant, deadline_s=float(-number), work=work), 0.0)
    served = dict.fromkeys(tenants, 0.0)
    left = {tenant: tenants.count(tenant) for tenant in served}
    while waiting:
        first = next(waiting.in_order())
        waiting.remove(first, sent=True)
        served[first.item] += work
        left[first.item] -= 1
        still = [served[tenant] for tenant in served if left[tenant]]
        if still:
            assert max(still) - min(still) <= QUANTUM + work + 1e-9


def test_one_that_comes_back_is_owed_nothing_for_its_absence() -> None:
    waiting = line()
    for number in range(40):
        waiting.add(entry("old", tenant="old", deadline_s=float(number)), 0.0)
    for _ in range(20):
        waiting.remove(next(waiting.in_order()), sent=True)
    for number in range(40):
        waiting.add(entry("new", tenant="new", deadline_s=float(number)), 0.0)

    assert 8 <= drain(waiting)[:20].count("new") <= 12


@given(entries)
def test_the_order_shown_is_the_order_sent(some: list[Entry[str]]) -> None:
    shown, sent = line(), line()
    for number, each in enumerate(some):
        for target in (shown, sent):
            copy = entry(
                str(number),
                tenant=each.tenant,
                priority=each.priority,
                deadline_s=each.deadline_s,
                work=each.work,
            )
            target.add(copy, 0.0)

    assert [each.item for each in shown.in_order()] == drain(sent)


@given(entries, st.integers(0, 39), st.floats(0, 50))
def test_nothing_is_lost_or_sent_twice(some: list[Entry[str]], num_taken: int, later_s: float) -> None:
    waiting = line()
    for number, each in enumerate(some):
        each.item = str(number)
        waiting.add(each, 0.0)
    taken = some[:num_taken]
    for each in taken:
        waiting.remove(each, sent=False)
    waiting.age(later_s)

    assert math.isclose(waiting.work(), sum(each.work for each in some[num_taken:]), abs_tol=1e-9)
    assert sorted(drain(waiting), key=int) == [each.item for each in some[num_taken:]]
    assert len(waiting) == 0


@given(entries, st.sampled_from("abcd"), st.integers(-2, 2), st.floats(0, 100))
def test_work_ahead_is_what_is_sent_first_give_or_take_a_quantum_a_tenant(
    some: list[Entry[str]], tenant: str, priority: int, deadline_s: float
) -> None:
    waiting = line()
    for each in some:
        waiting.add(each, 0.0)
    predicted = waiting.work_ahead(tenant, priority, deadline_s)
    newcomer = entry("newcomer", tenant=tenant, priority=priority, deadline_s=deadline_s, work=1.0)
    waiting.add(newcomer, 0.0)
    ahead = 0.0
    for each in waiting.in_order():
        if each is newcomer:
            break
        ahead += each.work

    largest = max((each.work for each in some), default=0.0)
    assert abs(predicted - ahead) <= 4 * (2 * QUANTUM + 2 * largest)


def test_a_full_line_makes_place_for_the_more_urgent_and_the_underserved() -> None:
    waiting = line()
    greedy = [entry(str(n), tenant="greedy", deadline_s=float(n)) for n in range(5)]
    for each in greedy:
        waiting.add(each, 0.0)

    assert waiting.to_displace("greedy", 0, 1.0) is None
    assert waiting.to_displace("modest", 0, 1.0) is greedy[-1]
    assert waiting.to_displace("modest", 0, 5.0) is None
    assert waiting.to_displace("greedy", -1, 1.0) is greedy[-1]
    assert waiting.to_displace("modest", 1, 1.0) is None


def test_only_time_with_somebody_waiting_counts_for_the_drain_rate() -> None:
    rate = DrainRate(window_s=5.0)
    assert rate.per_s(100.0) is None
    rate.begin(100.0)
    for tenth in range(1, 11):
        rate.sent(100.0 + tenth / 10, 0.2)
    rate.end(101.0)

    first = rate.per_s(101.0)
    assert first is not None
    assert 1.9 <= first <= 2.4
    assert rate.per_s(500.0) == first


def test_the_drain_rate_follows_a_change() -> None:
    rate = DrainRate(window_s=1.0)
    rate.begin(0.0)
    for tenth in range(50):
        rate.sent(tenth / 10, 0.5)
    for tenth in range(50, 100):
        rate.sent(tenth / 10, 0.1)

    assert math.isclose(rate.per_s(9.9) or 0.0, 1.0, rel_tol=0.15)
