"""No collection while it is asked for, and what was before afterwards."""

from __future__ import annotations

import gc

import pytest

from core.garbage import no_collection


def test_nothing_is_collected_inside_and_it_goes_on_afterwards() -> None:
    with no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_ends_it_too() -> None:
    with pytest.raises(RuntimeError), no_collection():
        raise RuntimeError
    assert gc.isenabled()


def test_what_was_off_stays_off() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
