"""Both phases stay served when workers go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.types import WorkerLoad
from planner.decision import RoleChange
from planner.observation import ObservedWorker
from planner.survivors import with_both_roles, with_decode
from tests.unit.planned import D, P, worker, workers


def seen(present: list[ObservedWorker]) -> dict[str, int]:
    """Each younger than the one before."""
    return {each.report.worker_id: number for number, each in enumerate(present)}


def roles_after(present: list[ObservedWorker], changes: tuple[RoleChange, ...]) -> dict[str, object]:
    roles = {each.report.worker_id: each.desired_role for each in present}
    return roles | {change.worker_id: change.role for change in changes}


def test_somebody_is_made_to_decode_the_least_busy_first() -> None:
    present = [worker("a", P, load=WorkerLoad(num_waiting=5)), worker("b", P)]
    (change,) = with_decode(present)
    assert (change.worker_id, change.role) == ("b", D)


def test_nobody_is_made_to_do_what_it_may_not() -> None:
    assert with_decode(workers(2, 0, allowed=[P])) == ()
    mixed = [*workers(1, 0, shape="p", allowed=[P]), worker("busy", P, load=WorkerLoad(num_waiting=99))]
    assert [change.worker_id for change in with_decode(mixed)] == ["busy"]


def test_the_oldest_stay_and_take_over_what_the_youngest_did() -> None:
    present = [worker("old", P), worker("older", P), worker("young", D)]
    changes = with_both_roles(present, seen(present), (), {"s": 2})
    after = roles_after(present, changes)
    assert sorted(str(after[name]) for name in ("old", "older")) == ["decode", "prefill"]


def test_the_last_worker_decodes_and_prefills_by_itself() -> None:
    present = [worker("old", P), worker("young", D)]
    changes = with_both_roles(present, seen(present), (), {"s": 1})
    assert roles_after(present, changes)["old"] is D
    again = [worker("old", D), worker("young", P)]
    assert with_both_roles(again, seen(again), (), {"s": 1}) == ()


def test_more_workers_change_nothing() -> None:
    present = workers(1, 1)
    assert with_both_roles(present, seen(present), (), {"s": 4}) == ()


def test_a_change_that_was_decided_is_kept_unless_it_leaves_a_role_empty() -> None:
    present = workers(1, 3)
    wish = RoleChange(worker_id="s-001", shape="s", role=P)
    assert with_both_roles(present, seen(present), (wish,), {"s": 4}) == (wish,)
    kept = with_both_roles(present, seen(present), (wish,), {"s": 2})
    after = roles_after(present, kept)
    assert sorted(str(after[name]) for name in ("s-000", "s-001")) == ["decode", "prefill"]


@given(st.lists(st.sampled_from([P, D]), min_size=1, max_size=8), st.data())
def test_those_who_stay_always_decode_and_prefill_if_both_were_done(roles: list, data: st.DataObject) -> None:
    present = [worker(f"w{number}", role) for number, role in enumerate(roles)]
    num = data.draw(st.integers(1, len(roles)))
    switched = data.draw(st.sets(st.sampled_from(range(len(roles)))))
    wishes = tuple(
        RoleChange(worker_id=f"w{n}", shape="s", role=D if roles[n] is P else P) for n in sorted(switched)
    )
    wanted = set(roles_after(present, wishes).values())
    changes = with_both_roles(present, seen(present), wishes, {"s": num})
    assert len({change.worker_id for change in changes}) == len(changes)
    after = roles_after(present, changes)
    stay = {after[f"w{number}"] for number in range(num)}
    assert D in stay or D not in wanted
    assert P in stay or P not in wanted or num == 1
