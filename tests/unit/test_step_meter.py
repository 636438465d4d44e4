"""When the steps of an engine begin and end, and what is left out."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from core.clock import ManualClock
from core.observed_steps import StepObservation
from core.performance_model import PrefillChunk
from engine.step_meter import StepMeter, observation


def step(
    new: dict[str, tuple[int, int, int]] | None = None,
    running: dict[str, tuple[int, int, int]] | None = None,
    **changes: Any,
) -> Any:
    """A scheduler output, of (tokens computed before, tokens now, prompt or output tokens) by request."""
    new, running = new or {}, running or {}
    scheduled = {name: now for name, (_, now, _) in (new | running).items()}
    fields = {
        "scheduled_new_reqs": [
            SimpleNamespace(req_id=name, num_computed_tokens=before, prompt_token_ids=[0] * prompt)
            for name, (before, _, prompt) in new.items()
        ],
        "scheduled_cached_reqs": SimpleNamespace(
            req_ids=list(running),
            num_computed_tokens=[before for before, _, _ in running.values()],
            num_output_tokens=[output for _, _, output in running.values()],
        ),
        "num_scheduled_tokens": scheduled,
        "total_num_scheduled_tokens": sum(scheduled.values()),
        "scheduled_spec_decode_tokens": {},
        "finished_req_ids": set(),
    }
    return SimpleNamespace(**(fields | changes))


class Engine:
    """A meter, and a clock that is moved as steps take place."""

    def __init__(self) -> None:
        self.clock = ManualClock(1000.0)
        self.meter = StepMeter(self.clock.now_s)

    def run(self, output: Any, seconds: float, *, scheduling_s: float = 0.0) -> StepObservation | None:
        """One step after the other."""
        self.clock.advance(scheduling_s)
        self.meter.scheduled(output)
        self.clock.advance(seconds)
        return self.done()

    def done(self) -> StepObservation | None:
        row = self.meter.done()
        return None if row is None else observation(json.loads(json.dumps(row)))


@pytest.fixture
def engine() -> Engine:
    return Engine()


def decode(num_tokens: int = 100, output: int = 1) -> Any:
    return step(running={"a": (num_tokens, 1, output)})


def test_a_prompt_on_an_idle_engine_takes_from_its_scheduling_to_its_token(engine: Engine) -> None:
    assert engine.run(step(new={"a": (16, 84, 100)}), 0.2) == StepObservation(
        prefills=(PrefillChunk(context_tokens=16, num_tokens=84, ends_prompt=True),),
        seconds=pytest.approx(0.2),
    )
    engine.clock.advance(100.0)
    later = engine.run(step(new={"b": (0, 100, 100)}), 0.2)
    assert later is not None
    assert later.seconds == pytest.approx(0.2)


def test_streams_that_run_on_feel_scheduling_too(engine: Engine) -> None:
    engine.run(step(new={"a": (0, 100, 100)}), 0.2)
    observed = engine.run(decode(), 0.02, scheduling_s=0.003)
    assert observed == StepObservation(num_decoding=1, decode_kv_tokens=100, seconds=pytest.approx(0.023))


def test_an_engine_that_was_held_up_between_two_steps_is_not_a_slow_one(engine: Engine) -> None:
    engine.run(step(new={"a": (0, 100, 100)}), 0.2)
    observed = engine.run(decode(), 0.02, scheduling_s=3.0)
    assert observed is not None
    assert observed.seconds == pytest.approx(0.02)


def test_a_step_that_was_sent_while_another_ran_starts_at_the_others_end(engine: Engine) -> None:
    engine.meter.scheduled(step(new={"a": (0, 100, 100)}))
    engine.clock.advance(0.01)
    engine.meter.scheduled(decode())
    engine.clock.advance(0.19)
    first = engine.done()
    engine.clock.advance(0.01)
    engine.meter.scheduled(step(new={"b": (0, 50, 50)}))
    engine.clock.advance(0.02)
    second = engine.done()
    engine.clock.advance(0.1)
    third = engine.done()
    assert [round(seen.seconds, 6) for seen in (first, second, third) if seen is not None] == [0.2, 0.03, 0.1]


def test_a_step_that_only_polls_for_transfers_is_left_out(engine: Engine) -> None:
    assert engine.run(step(), 0.5) is None
    observed = engine.run(step(new={"a": (99, 1, 100)}), 0.02)
    assert observed == StepObservation(num_decoding=1, decode_kv_tokens=99, seconds=pytest.approx(0.02))


def test_a_step_with_drafted_tokens_is_left_out(engine: Engine) -> None:
    drafted = step(running={"a": (100, 3, 1)}, scheduled_spec_decode_tokens={"a": [1, 2]})
    assert engine.run(drafted, 0.1) is None


def test_few_steps_of_a_kind_are_looked_into_and_lengths_of_prompts_kept_all_the_same(engine: Engine) -> None:
    assert engine.run(step(new={"a": (0, 64, 100)}), 0.01) is not None
    assert engine.run(step(new={"b": (0, 64, 200)}), 0.01) is None
    assert engine.run(decode(), 0.01) is not None
    assert engine.run(decode(), 0.01) is None
    engine.clock.advance(1.0)
    going_on = step(running={"b": (64, 64, 0)}, finished_req_ids={"a"})
    observed = engine.run(going_on, 0.01)
    assert observed is not None
    assert [chunk.ends_prompt for chunk in observed.prefills] == [False]
    engine.clock.advance(1.0)
    observed = engine.run(step(running={"b": (128, 72, 0)}), 0.01)
    assert observed is not None
    assert [chunk.ends_prompt for chunk in observed.prefills] == [True]
