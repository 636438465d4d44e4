"""The splits to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from core.types import Role
from planner.settings import PlannedShape
from planner.split import PlannedSplit, ShapeSplit

MAX_SPLITS = 400
"""More than these are not all looked at: then only those within some moves of the one that is there."""
_REACHES = (16, 8, 4, 2, 1)
_SIZED_REACH = 3


def role_splits(shapes: Sequence[PlannedShape], present: PlannedSplit) -> list[PlannedSplit]:
    """Every way to give roles to the workers that are present, the present one first.

    Where there are very many, those that switch only a few workers of each shape. At least one worker
    decodes, if any can.
    """
    by_name = {shape.name: shape for shape in shapes}
    for reach in (None, *_REACHES):
        lines = [_line(by_name[split.shape], split, reach) for split in present.shapes]
        num = 1
        for line in lines:
            num *= len(line)
        if num <= MAX_SPLITS:
            break
    splits = [PlannedSplit(choice) for choice in product(*lines)]
    able = [split for split in splits if split.num_decode]
    return [present, *(split for split in able if split != present)]


def _line(shape: PlannedShape, present: ShapeSplit, reach: int | None) -> list[ShapeSplit]:
    num_workers = present.num_workers
    if len(shape.allowed_roles) == 1:
        (role,) = shape.allowed_roles
        num_prefill = num_workers if role is Role.PREFILL else 0
        return [ShapeSplit(shape.name, num_prefill, num_workers - num_prefill)]
    low, high = 0, num_workers
    if reach is not None:
        low, high = max(0, present.num_prefill - reach), min(num_workers, present.num_prefill + reach)
    return [ShapeSplit(shape.name, num, num_workers - num) for num in range(low, high + 1)]


def sized_splits(
    shapes: Sequence[PlannedShape], counts: Mapping[str, int], prefill_share: float
) -> list[PlannedSplit]:
    """Ways to give roles to so many workers of each shape.

    Args:
        prefill_share: the part of the workers that should prefill; with many workers only splits near
            it are looked at.
    """
    lines = []
    for shape in shapes:
        num = counts[shape.name]
        line = _line(shape, ShapeSplit(shape.name, 0, num), None)
        if len(line) > 2 * _SIZED_REACH + 2:
            middle = round(prefill_share * num)
            line = [split for split in line if abs(split.num_prefill - middle) <= _SIZED_REACH]
        lines.append(line)
    return [split for split in map(PlannedSplit, product(*lines)) if split.num_decode]
