"""The splits that are looked at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.types import Role
from planner.candidates import MAX_SPLITS, role_splits, sized_splits
from planner.split import PlannedSplit, ShapeSplit
from tests.unit.planned import D, P, shape


def split(**by_shape: tuple[int, int]) -> PlannedSplit:
    return PlannedSplit(tuple(ShapeSplit(name, *nums) for name, nums in by_shape.items()))


def test_one_shape_has_every_split_with_somebody_to_decode() -> None:
    splits = role_splits([shape("s")], split(s=(1, 3)))
    assert splits[0] == split(s=(1, 3))
    assert {each.num_prefill for each in splits} == {0, 1, 2, 3}
    assert len(splits) == 4


def test_a_shape_of_one_role_keeps_it() -> None:
    shapes = [shape("p", [P]), shape("d", [D]), shape("both")]
    splits = role_splits(shapes, split(p=(2, 0), d=(0, 2), both=(1, 2)))
    assert {(each.of("p"), each.of("d")) for each in splits} == {
        (ShapeSplit("p", 2, 0), ShapeSplit("d", 0, 2))
    }
    assert {each.of("both").num_prefill for each in splits} == {0, 1, 2, 3}


def test_where_nobody_may_decode_only_what_is_there_is_left() -> None:
    assert role_splits([shape("p", [P])], split(p=(3, 0))) == [split(p=(3, 0))]


@pytest.mark.parametrize(("num_shapes", "num_workers"), [(1, 64), (2, 64), (3, 21), (4, 16)])
def test_many_workers_do_not_make_too_many_splits(num_shapes: int, num_workers: int) -> None:
    names = [f"s{number}" for number in range(num_shapes)]
    present = split(**dict.fromkeys(names, (num_workers // 2, num_workers - num_workers // 2)))
    splits = role_splits([shape(name) for name in names], present)
    assert len(splits) <= MAX_SPLITS
    near = {each.num_prefill for each in splits}
    assert {present.num_prefill - 1, present.num_prefill + 1} <= near


counts = st.tuples(st.integers(0, 12), st.integers(0, 12))


@given(st.dictionaries(st.sampled_from("abc"), counts, min_size=1))
def test_workers_never_come_or_go(by_shape: dict[str, tuple[int, int]]) -> None:
    roles = {"a": frozenset(Role), "b": frozenset([D]), "c": frozenset(Role)}
    present = split(**{name: (0, sum(nums)) if name == "b" else nums for name, nums in by_shape.items()})
    splits = role_splits([shape(name, roles[name]) for name in by_shape], present)
    assert splits[0] == present
    assert len(set(splits)) == len(splits)
    for each in splits[1:]:
        assert each.num_decode >= 1
        for of_shape, before in zip(each.shapes, present.shapes, strict=True):
            assert of_shape.num_workers == before.num_workers
            assert min(of_shape.num_prefill, of_shape.num_decode) >= 0
            assert of_shape.shape != "b" or of_shape.num_prefill == 0


def test_a_size_has_splits_around_the_share_of_prompt_work() -> None:
    splits = sized_splits([shape("s")], {"s": 40}, 0.25)
    numbers = sorted(each.num_prefill for each in splits)
    assert 10 in numbers
    assert len(numbers) < 20
    assert sized_splits([shape("s")], {"s": 3}, 0.9) == [split(s=(num, 3 - num)) for num in range(3)]
    assert sized_splits([shape("p", [P])], {"p": 3}, 0.5) == []
