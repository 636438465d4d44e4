"""Keeps values that users choose from growing the number of time series without bound."""

from __future__ import annotations

OTHER = "other"
"""The label value that stands for all values beyond the limit."""


class LabelLimit:
    """Lets the first ``max_values`` distinct values through and turns the rest into ``other``.

    The empty value (the base model, no tenant) always passes.
    """

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._admitted = {"", OTHER}

    def __call__(self, value: str) -> str:
        if value in self._admitted:
            return value
        if len(self._admitted) >= self._max_values + 2:
            return OTHER
        self._admitted.add(value)
        return value
