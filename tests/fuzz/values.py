"""Values of any kind and size, and bytes that almost mean something."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([-(2**63), -(2**31), -1, 0, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "\0", "a" * 300, "é" * 50, "../..", "{}", "null"])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=8))
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
DEEP_MSGPACK = b"\x91" * 100_000 + b"\x01"
"""Lists in lists: deeper than any parser that calls itself can go."""


def msgpacked(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return values.map(msgspec.msgpack.encode)


@st.composite
def mutated(draw: st.DrawFn, originals: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few of them flipped, cut out, doubled or put in."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "cut", "double", "insert", "truncate"]))
        if kind == "flip" and place < len(data):
            data[place] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 8))]
        elif kind == "double":
            data[place:place] = data[place : place + draw(st.integers(1, 8))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        else:
            del data[place:]
    return bytes(data)
