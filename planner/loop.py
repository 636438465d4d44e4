"""The planner at work: observe, decide, carry out, remember; once an interval, whatever happens.

Nothing here waits without limit, and no failure ends it. What could not be observed is not decided for;
what could not be carried out is decided for anew, because the next look finds it undone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from core.clock import Clock
from planner.decision import PlanDecision, RoleChange, Verdict
from planner.history import History, PastDecision
from planner.instruments import Instruments
from planner.mode import Mode
from planner.observation import Observation
from planner.ports import ClusterPort, DecidesSplits, Scaler
from telemetry.logs import fields

logger = logging.getLogger(__name__)

T = TypeVar("T")

CALL_TIMEOUT_S = 3.0
"""Longest wait for an answer from the registry or the scaler."""
_NUM_LOGGED_ALTERNATIVES = 5


class PlannerLoop:
    """One model's.

    Args:
        scaler: None leaves the numbers of workers as they are.
        instruments: shown every look and every failure.
        wall_clock: seconds since 1970, for the history.
    """

    def __init__(
        self,
        planner: DecidesSplits,
        cluster: ClusterPort,
        scaler: Scaler | None,
        instruments: Instruments,
        clock: Clock,
        *,
        mode: Mode,
        interval_s: float,
        call_timeout_s: float = CALL_TIMEOUT_S,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.history = History()
        self.trouble: str | None = None
        """Why the last look came to nothing, None if it did not."""
        self._planner = planner
        self._cluster = cluster
        self._scaler = scaler
        self._instruments = instruments
        self._clock = clock
        self._mode = mode
        self._interval_s = interval_s
        self._call_timeout_s = call_timeout_s
        self._wall_clock = wall_clock
        self._wanted: Mapping[str, int] = {}
        self._scaler_trouble: str | None = None
        self._logged: PlanDecision | None = None

    async def run(self) -> None:
        """Looks once an interval until it is cancelled."""
        while True:
            began_s = self._clock.now_s()
            try:
                await self.look()
            except Exception as error:
                self._troubled("loop", error)
            took_s = self._clock.now_s() - began_s
            await asyncio.sleep(min(max(self._interval_s - took_s, 0.0), self._interval_s))

    async def look(self) -> None:
        """One look at the cluster and what follows from it."""
        try:
            observation = await self._in_time(self._cluster.observe())
        except Exception as error:
            self._troubled("observe", error)
            return
        self._instruments.observed(observation)
        if self._scaler is not None:
            observation = replace(observation, wanted=await self._wanted_workers(self._scaler))
        began_s = time.thread_time()
        try:
            decision = self._planner.step(observation)
        except Exception as error:
            self._troubled("decide", error)
            return
        cpu_s = time.thread_time() - began_s
        self._recovered()
        await self._follow(observation, decision, cpu_s)

    async def _follow(self, observation: Observation, decision: PlanDecision, cpu_s: float) -> None:
        decided_at_s = self._wall_clock()
        carry_out = self._mode is Mode.AUTO and decision.changes_something
        failures = await self._carry_out(observation, decision) if carry_out else ()
        past = PastDecision(
            at_s=decided_at_s,
            decision=decision,
            cpu_s=cpu_s,
            carried_out=carry_out and not failures,
            failures=failures,
        )
        self.history.add(past)
        self._log(past)
        self._instruments.decided(observation, decision, cpu_s)

    # Carrying out.

    async def _carry_out(self, observation: Observation, decision: PlanDecision) -> tuple[str, ...]:
        """Everything at once; returns what failed."""
        before = {worker.report.worker_id: worker.desired_role for worker in observation.workers}
        tasks = [self._switch(change, before) for change in decision.role_changes]
        if self._scaler is not None:
            tasks += [
                self._scale(self._scaler, shape, num_workers)
                for shape, num_workers in decision.counts.items()
            ]
        return tuple(failure for failure in await asyncio.gather(*tasks) if failure)

    async def _switch(self, change: RoleChange, before: Mapping[str, str]) -> str:
        try:
            await self._in_time(self._cluster.assign_role(change.worker_id, change.role))
        except Exception as error:
            self._instruments.failed("switch")
            return f"{change.worker_id} to {change.role}: {_essence(error)}"
        self._instruments.role_changed(before.get(change.worker_id, ""), change.role)
        return ""

    async def _scale(self, scaler: Scaler, shape: str, num_workers: int) -> str:
        try:
            await self._in_time(scaler.ask(shape, num_workers))
        except Exception as error:
            self._instruments.failed("scale")
            return f"{num_workers} workers of {shape}: {_essence(error)}"
        return ""

    async def _wanted_workers(self, scaler: Scaler) -> Mapping[str, int]:
        """The last answer holds while there is none: roles need not wait for who counts workers."""
        try:
            self._wanted = await self._in_time(scaler.wanted())
            self._scaler_trouble = None
        except Exception as error:
            self._instruments.failed("scale")
            if self._scaler_trouble is None:
                logger.warning("who counts workers does not answer", extra=fields(error=repr(error)))
            self._scaler_trouble = _essence(error)
        return self._wanted

    async def _in_time(self, answer: Awaitable[T]) -> T:
        # Not wait_for: it can lose a cancellation that comes together with the answer.
        async with asyncio.timeout(self._call_timeout_s):
            return await answer

    # Telling.

    def _troubled(self, doing: str, error: Exception) -> None:
        """Nothing changes. The same trouble is logged once, however long it lasts."""
        self._instruments.failed(doing)
        trouble = f"{doing}: {_essence(error)}"
        if self.trouble != trouble:
            logger.warning(
                "the planner holds",
                extra=fields(trouble=trouble),
                exc_info=None if doing == "observe" else error,
            )
        self.trouble = trouble

    def _recovered(self) -> None:
        if self.trouble is not None:
            logger.info("the planner decides again")
        self.trouble = None

    def _log(self, past: PastDecision) -> None:
        """Moves, and what differs from what was logged last: a hold is logged once, not every second."""
        decision, last = past.decision, self._logged
        if past.failures:
            logger.warning("not carried out", extra=fields(failures="; ".join(past.failures)))
        if last is not None and decision.verdict is last.verdict:
            same = (decision.role_changes, decision.counts) == (last.role_changes, last.counts)
            if decision.verdict is not Verdict.MOVE or same:
                return
        self._logged = decision
        logger.info(
            "planned",
            extra=fields(
                number=decision.number,
                verdict=decision.verdict.value,
                split=decision.split,
                reason=decision.reason,
                carried_out=past.carried_out,
                roles=", ".join(f"{change.worker_id} to {change.role}" for change in decision.role_changes),
                counts=", ".join(f"{shape} {num}" for shape, num in decision.counts.items()),
                inputs=", ".join(f"{name} {value:.4g}" for name, value in decision.inputs.items()),
                alternatives=", ".join(
                    f"{each.split} {each.score:.4g}"
                    for each in decision.alternatives[:_NUM_LOGGED_ALTERNATIVES]
                ),
                cpu_s=past.cpu_s,
            ),
        )


def _essence(error: Exception) -> str:
    """Its last line: Ray puts a whole traceback of the other side before it."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
