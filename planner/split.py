"""Splits: how many workers of each shape have which role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from core.types import Role


@dataclass(frozen=True, slots=True)
class ShapeSplit:
    """Workers of one shape."""

    shape: str
    num_prefill: int
    num_decode: int

    @property
    def num_workers(self) -> int:
        return self.num_prefill + self.num_decode

    def num_of(self, role: Role) -> int:
        """Workers that have the role."""
        return self.num_prefill if role is Role.PREFILL else self.num_decode


@dataclass(frozen=True, slots=True)
class PlannedSplit:
    """Workers of all shapes, in a fixed order of shapes."""

    shapes: tuple[ShapeSplit, ...]

    @property
    def num_prefill(self) -> int:
        return sum(shape.num_prefill for shape in self.shapes)

    @property
    def num_decode(self) -> int:
        return sum(shape.num_decode for shape in self.shapes)

    @property
    def label(self) -> str:
        """Such as ``3P+5D``, or with more than one shape ``h100 3P+1D, h200 2D``."""
        if len(self.shapes) == 1:
            return _counts(self.shapes[0])
        named = [f"{shape.shape} {_counts(shape)}" for shape in self.shapes if shape.num_workers]
        return ", ".join(named) or "none"

    def of(self, shape: str) -> ShapeSplit:
        """
        Raises:
            KeyError: no such shape.
        """
        for split in self.shapes:
            if split.shape == shape:
                return split
        raise KeyError(shape)

    def num_gpus(self, gpus_per_worker: Mapping[str, float]) -> float:
        """GPUs it takes."""
        return sum(shape.num_workers * gpus_per_worker[shape.shape] for shape in self.shapes)


def _counts(split: ShapeSplit) -> str:
    both = [f"{split.num_prefill}P" if split.num_prefill else "", f"{split.num_decode}D"]
    return "+".join(filter(None, both))


def split_of(roles: Iterable[tuple[str, Role]], shapes: Iterable[str]) -> PlannedSplit:
    """The split that workers make up.

    Args:
        roles: shape and role of each worker.
        shapes: all there are, in order.
    """
    present = list(roles)
    return PlannedSplit(
        tuple(
            ShapeSplit(shape, present.count((shape, Role.PREFILL)), present.count((shape, Role.DECODE)))
            for shape in shapes
        )
    )
