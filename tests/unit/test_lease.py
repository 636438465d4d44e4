"""Deadlines on this clock for leases on another: never later than the truth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.lease import MAX_ANCHOR_AGE_S, MAX_DRIFT, ClockAnchor, ClockAnchors

seconds = st.floats(0, 1e6)


@given(
    offset_s=st.floats(-1e6, 1e6),
    drift=st.floats(-MAX_DRIFT, MAX_DRIFT),
    there_s=st.floats(0, 100),
    lease_s=st.floats(0, 120),
)
def test_a_deadline_is_never_after_the_end_of_the_lease(
    offset_s: float, drift: float, there_s: float, lease_s: float
) -> None:
    """The peer's clock reads offset + (1 + drift) * t; its answer was given there_s after the question."""
    sent_at_s = 50.0
    peer_now_s = offset_s + (1 + drift) * (sent_at_s + there_s)
    expires_at_s = peer_now_s + lease_s
    truth_s = (expires_at_s - offset_s) / (1 + drift)
    deadline_s = ClockAnchor(sent_at_s, peer_now_s).deadline_s(expires_at_s)
    assert deadline_s <= truth_s + 1e-6


def test_a_deadline_loses_no_more_than_the_round_trip_and_the_drift() -> None:
    anchor = ClockAnchor(sent_at_s=10.0, peer_now_s=1000.0)
    assert 40.0 - 30 * MAX_DRIFT - 1e-9 <= anchor.deadline_s(1030.0) <= 40.0


def test_old_anchors_are_not_used() -> None:
    anchors = ClockAnchors()
    anchors.set("i", ClockAnchor(0.0, 0.0))
    assert anchors.fresh("i", MAX_ANCHOR_AGE_S) is not None
    assert anchors.fresh("i", MAX_ANCHOR_AGE_S + 1) is None
    assert anchors.fresh("j", 0.0) is None


def test_the_number_of_anchors_is_bounded() -> None:
    anchors = ClockAnchors(max_peers=2)
    for name in "abc":
        anchors.set(name, ClockAnchor(0.0, 0.0))
    assert anchors.fresh("a", 0.0) is None
    assert anchors.fresh("c", 0.0) is not None
