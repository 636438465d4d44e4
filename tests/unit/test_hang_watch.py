"""When an engine counts as hung: probes without an answer, while the watcher itself was awake."""

from __future__ import annotations

from deploy.hang_watch import HangWatch

LOOK_S = 0.25


def looking(watch: HangWatch, from_s: float, seconds: float) -> float:
    """Looks every quarter of a second.

    Returns:
        When it looked last.
    """
    for number in range(round(seconds / LOOK_S) + 1):
        watch.look(from_s + number * LOOK_S)
    return from_s + seconds


def test_an_engine_that_answers_in_time_is_not_hung() -> None:
    watch = HangWatch(20.0)
    for start_s in (0.0, 100.0, 200.0):
        looking(watch, start_s, 19.0)
        assert not watch.hung
        watch.answered()


def test_a_silent_engine_is_hung_then_lost_and_well_again_when_it_answers() -> None:
    watch = HangWatch(20.0)
    now_s = looking(watch, 0.0, 20.0)
    assert watch.hung
    assert not watch.lost
    looking(watch, now_s, 40.0)
    assert watch.lost
    watch.answered()
    assert not watch.hung
    assert not watch.lost


def test_time_in_which_the_watcher_was_stopped_itself_does_not_count() -> None:
    watch = HangWatch(20.0)
    looking(watch, 0.0, 1.0)
    looking(watch, 1000.0, 10.0)
    assert watch.silent_s < 15.0
    assert not watch.hung
