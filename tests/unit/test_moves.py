"""From one split to another: who changes, and what that costs."""

from __future__ import annotations

from dataclasses import replace

from core.types import WorkerLoad
from planner.moves import cheapest_moves, price
from planner.split import PlannedSplit, ShapeSplit, split_of
from tests.unit.planned import D, P, worker, workers


def target(num_prefill: int, num_decode: int, shape: str = "s") -> PlannedSplit:
    return PlannedSplit((ShapeSplit(shape, num_prefill, num_decode),))


def test_the_least_busy_worker_changes() -> None:
    present = [
        worker("busy", D, load=WorkerLoad(num_running=40, num_decoding=40)),
        worker("calm", D, load=WorkerLoad(num_running=2, num_decoding=2)),
        worker("p", P),
    ]
    moves = cheapest_moves(present, target(2, 1))
    assert [(change.worker_id, change.role) for change in moves.changes] == [("calm", P)]
    assert moves.cost_requests > cheapest_moves([worker("d", D), worker("e", D)], target(1, 1)).cost_requests


def test_a_prefill_worker_without_a_queue_changes_first() -> None:
    present = [worker("a", P, load=WorkerLoad(num_waiting=9)), worker("b", P), worker("d", D)]
    assert [change.worker_id for change in cheapest_moves(present, target(1, 2)).changes] == ["b"]


def test_several_change_at_once_and_each_costs() -> None:
    one, three = (cheapest_moves(workers(1, 7), target(num, 8 - num)) for num in (2, 4))
    assert len(three.changes) == 3
    assert len({change.worker_id for change in three.changes}) == 3
    assert three.cost_requests > one.cost_requests > 0


def test_the_split_that_is_there_costs_nothing() -> None:
    moves = cheapest_moves(workers(3, 5), target(3, 5))
    assert (moves.changes, moves.cost_requests) == ((), 0.0)


def test_workers_of_one_shape_do_not_stand_in_for_another() -> None:
    present = [*workers(1, 1, shape="a"), *workers(1, 1, shape="b")]
    wanted = PlannedSplit((ShapeSplit("a", 2, 0), ShapeSplit("b", 0, 2)))
    changes = {
        change.worker_id: (change.shape, change.role) for change in cheapest_moves(present, wanted).changes
    }
    assert changes == {"a-001": ("a", P), "b-000": ("b", D)}


def test_the_role_that_was_asked_for_counts_not_the_one_reported() -> None:
    told = worker("w", P)
    on_its_way = replace(told, desired_role=D)
    assert cheapest_moves([on_its_way], target(0, 1)).changes == ()


def test_busier_workers_never_cost_less() -> None:
    for role, field in ((D, "num_running"), (P, "num_waiting")):
        prices = [price(worker("w", role, load=WorkerLoad(**{field: num}))) for num in range(0, 100, 10)]
        assert prices == sorted(prices)
        assert prices[0] >= 0.0


def test_a_split_is_counted_by_shape_and_role() -> None:
    split = split_of([("a", P), ("a", D), ("b", D), ("a", P)], ["a", "b", "c"])
    assert split.shapes == (ShapeSplit("a", 2, 1), ShapeSplit("b", 0, 1), ShapeSplit("c", 0, 0))
    assert (split.num_prefill, split.num_decode) == (2, 2)
    assert split.num_gpus({"a": 2.0, "b": 8.0, "c": 1.0}) == 14.0
