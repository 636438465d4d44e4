"""Unit tests cannot start Ray: they take seconds, and Ray does not."""

from __future__ import annotations

from typing import NoReturn

import pytest
import ray


@pytest.fixture(autouse=True)
def ray_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a unit test tried to start Ray; move it out of tests/unit and mark it engine")

    monkeypatch.setattr(ray, "init", refuse)
