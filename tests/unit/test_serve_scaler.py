"""The scaler and the policy at Serve's end, with a board that is no actor."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from core.errors import ScalingError
from core.types import Role
from planner import count_board
from planner.count_board import AskedCount, CountBoard
from planner.serve_scaler import ServeScaler
from planner.settings import PlannedShape


class LocalBoard:
    """An actor's handle, its methods called here and now."""

    def __init__(self, *, dead: bool = False) -> None:
        self._board = CountBoard()
        self._dead = dead

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._call(getattr(self._board, name), *args))

    async def _call(self, method: Any, *args: Any) -> Any:
        if self._dead:
            raise RayActorError
        return await method(*args)


class LocalAnswer:
    """What a policy gets from the actor: a future, done at once unless told otherwise."""

    def __init__(self, call: Coroutine[Any, Any, Any], *, done: bool = True) -> None:
        self._future: Future[Any] = Future()
        try:
            result = asyncio.run(call)
        except RayActorError as error:
            self._future.set_exception(error)
        else:
            if done:
                self._future.set_result(result)

    def future(self) -> Future[Any]:
        return self._future


def shape(name: str, least: int, most: int, gpus: float = 1.0) -> PlannedShape:
    return PlannedShape(
        name=name,
        allowed_roles=frozenset(Role),
        gpus_per_worker=gpus,
        min_workers=least,
        max_workers=most,
        startup_s=1.0,
    )


def scaler(
    board: LocalBoard, *shapes: PlannedShape, gpu_budget: float | None = None, timeout_s: float = 5.0
) -> ServeScaler:
    scaler = ServeScaler(shapes, board="board", gpu_budget=gpu_budget, timeout_s=timeout_s)
    scaler._board = board
    return scaler


async def serve_looks(board: LocalBoard, shape: str, target: int) -> None:
    """Serve's side: takes up what is asked for, for a while."""
    for _ in range(100):
        asked = await board.exchange.remote(shape, target)
        target = target if asked is None else asked
        await asyncio.sleep(0.01)


async def test_asking_returns_when_serve_has_taken_it_up() -> None:
    board = LocalBoard()
    looking = asyncio.create_task(serve_looks(board, "a", 2))
    asking = scaler(board, shape("a", 1, 4), shape("b", 3, 3))
    assert await asking.wanted() == {"a": 2, "b": 3}
    await asking.ask("a", 4)
    assert await asking.wanted() == {"a": 4, "b": 3}
    looking.cancel()


async def test_asking_for_what_may_not_be_is_refused() -> None:
    board = LocalBoard()
    await board.exchange.remote("a", 4)
    asking = scaler(board, shape("a", 1, 6, gpus=2.0), shape("b", 3, 3), gpu_budget=10)
    with pytest.raises(ValueError, match="no shape 'c'; known: a, b"):
        await asking.ask("c", 1)
    with pytest.raises(ValueError, match="shape 'a' may have 1 to 6 workers, not 7"):
        await asking.ask("a", 7)
    with pytest.raises(ValueError, match="shape 'b' may have 3 to 3 workers, not 2"):
        await asking.ask("b", 2)
    with pytest.raises(ValueError, match="5 workers of shape 'a' make 13 GPUs in all; the budget is 10"):
        await asking.ask("a", 5)
    looking = asyncio.create_task(serve_looks(board, "a", 4))
    await asking.ask("a", 3)  # fewer is right even where the budget is passed already
    looking.cancel()


async def test_no_answer_from_serve_is_said() -> None:
    board = LocalBoard()
    asking = scaler(board, shape("a", 1, 4), timeout_s=0.2)
    with pytest.raises(ScalingError, match=r"not said how many workers it wants within 0.2 s"):
        await asking.wanted()
    await board.exchange.remote("a", 2)
    with pytest.raises(ScalingError, match=r"not taken up 3 workers of shape 'a' within 0.2 s"):
        await asking.ask("a", 3)
    assert await board.exchange.remote("a", 2) == 3, "what was asked for stands"


async def test_after_a_lost_board_there_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = scaler(LocalBoard(dead=True), shape("a", 1, 4))
    with pytest.raises(ScalingError, match="board that tells Ray Serve the counts is gone"):
        await asking.wanted()
    board = LocalBoard()
    await board.exchange.remote("a", 2)
    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: board))
    monkeypatch.setattr(ray, "remote", lambda _: actor)
    assert await asking.wanted() == {"a": 2}


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [100.0]
    monkeypatch.setattr(count_board.time, "monotonic", lambda: now_s[0])
    return now_s


def answers_with(monkeypatch: pytest.MonkeyPatch, board: LocalBoard, *, done: bool = True) -> None:
    def exchange(*args: Any) -> LocalAnswer:
        return LocalAnswer(board.exchange.remote(*args), done=done)

    handle = SimpleNamespace(exchange=SimpleNamespace(remote=exchange))
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: handle)


def count(policy: AskedCount, target: int, now_s: list[float], after_s: float = 1.0) -> int:
    now_s[0] += after_s
    num_replicas, state = policy(SimpleNamespace(target_num_replicas=target))
    assert state == {}
    return num_replicas


def test_the_policy_follows_the_board(monkeypatch: pytest.MonkeyPatch, now_s: list[float]) -> None:
    board, policy = LocalBoard(), AskedCount("a", "board")
    answers_with(monkeypatch, board)
    assert count(policy, 2, now_s) == 2
    assert asyncio.run(board.wanted.remote()) == {"a": 2}
    asyncio.run(board.ask.remote("a", 5))
    counts = [count(policy, 2, now_s) for _ in range(3)]
    assert counts[-1] == 5
    assert count(policy, 2, now_s) == 5, "also where Serve has gone back to its own number"


def test_without_a_board_the_policy_keeps_what_is(
    monkeypatch: pytest.MonkeyPatch, now_s: list[float]
) -> None:
    def nobody(name: str, namespace: str) -> None:
        raise ValueError(f"no actor {name}")

    policy = AskedCount("a", "board")
    monkeypatch.setattr(ray, "get_actor", nobody)
    assert count(policy, 3, now_s) == 3
    answers_with(monkeypatch, LocalBoard(dead=True))
    assert [count(policy, 3, now_s) for _ in range(3)] == [3, 3, 3]
    board = LocalBoard()
    asyncio.run(board.ask.remote("a", 1))
    answers_with(monkeypatch, board)
    assert [count(policy, 3, now_s) for _ in range(4)][-1] == 1


def test_the_policy_does_not_wait(monkeypatch: pytest.MonkeyPatch, now_s: list[float]) -> None:
    board, policy = LocalBoard(), AskedCount("a", "board")
    answers_with(monkeypatch, board, done=False)
    asyncio.run(board.ask.remote("a", 1))
    assert [count(policy, 3, now_s) for _ in range(5)] == [3] * 5
