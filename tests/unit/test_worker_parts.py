"""The small parts of a worker: gate, reservations, outbox."""

from __future__ import annotations

import asyncio

import pytest

from baton_proto import worker_pb2
from core.clock import ManualClock
from core.errors import Draining, Overloaded
from decode_workers.outbox import Outbox
from decode_workers.reservations import Reservations
from engine.gate import Gate


def test_a_full_gate_refuses() -> None:
    gate = Gate(max_requests=1)
    with gate.enter(), pytest.raises(Overloaded), gate.enter():
        pass
    with gate.enter():
        pass


async def test_a_draining_gate_refuses_and_waits_for_what_is_inside() -> None:
    gate = Gate(max_requests=2)
    with gate.enter():
        assert not await gate.drain(0.01)
        with pytest.raises(Draining):
            gate.check()
    assert await gate.drain(0.01)


def test_reservations_never_promise_more_than_there_is() -> None:
    rooms = Reservations(capacity_tokens=100, ttl_s=10, clock=ManualClock())
    rooms.reserve("a", 40, used_tokens=20)
    with pytest.raises(Overloaded, match="40 free"):
        rooms.reserve("b", 41, used_tokens=20)
    rooms.reserve("b", 40, used_tokens=20)
    rooms.release("a")
    rooms.release("a")
    assert rooms.num_promised_tokens == 40


def test_forgotten_reservations_run_out() -> None:
    clock = ManualClock()
    rooms = Reservations(capacity_tokens=100, ttl_s=10, clock=clock)
    rooms.reserve("a", 100, used_tokens=0)
    clock.advance(11)
    rooms.reserve("b", 100, used_tokens=0)
    assert rooms.num_promised_tokens == 100


async def test_an_outbox_sends_what_arrived_in_one_turn_together() -> None:
    outbox = Outbox()
    taking = asyncio.create_task(outbox.take(1.0))
    await asyncio.sleep(0)
    for request_id in "abc":
        outbox.push(worker_pb2.Delta(request_id=request_id))
    assert [delta.request_id for delta in await taking] == ["a", "b", "c"]
    assert await outbox.take(0.01) == []


async def test_closing_an_outbox_ends_its_tasks() -> None:
    outbox = Outbox()
    task = asyncio.create_task(asyncio.sleep(60))
    outbox.tasks["a"] = task
    await asyncio.sleep(0)
    await outbox.close()
    assert task.cancelled()
