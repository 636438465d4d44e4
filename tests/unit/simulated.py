"""Small simulated clusters, and a simulation that is checked after every event."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from core.performance_model import KvLink, LinearStepTime, PrefillChunk, StepTime
from core.types import Role
from core.worker_events import WorkerModelConfig
from planner.planner import Planner
from router.policy import LeastLoadPolicy
from simulator.actions import Action
from simulator.event_queue import EventQueue
from simulator.planner_loop import MakePlanner
from simulator.result import SimulationResult
from simulator.simulation import Simulation
from simulator.spec import ClusterSpec, WorkerGroup
from simulator.traces.trace import Trace, TraceRequest

STEP = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.1,
    prefill_base_ms=10.0,
    decode_base_ms=5.0,
    decode_ms_per_seq=1.0,
    decode_ms_per_kv_token=0.0,
)
"""A prompt of n tokens alone takes 10 + n/10 ms, a decode step of b sequences 5 + b ms."""
ROOMY = WorkerModelConfig(
    num_kv_blocks=1000, block_size_tokens=4, max_num_seqs=32, max_num_batched_tokens=512
)
LINK = KvLink(latency_s=0.002, bytes_per_s=1e6)
KV_BYTES_PER_TOKEN = 100
"""A token's KV takes 0.1 ms."""


def group(
    num_prefill: int,
    num_decode: int,
    *,
    shape: str = "w",
    step_time: StepTime = STEP,
    worker: WorkerModelConfig = ROOMY,
    **more: Any,
) -> WorkerGroup:
    settings: dict[str, Any] = {"kv_bytes_per_token": KV_BYTES_PER_TOKEN, "link": LINK, "startup_s": 3.0}
    return WorkerGroup(
        shape=shape,
        num_workers={Role.PREFILL: num_prefill, Role.DECODE: num_decode},
        step_time=dict.fromkeys(Role, step_time),
        worker=worker,
        **(settings | more),
    )


def cluster(num_prefill: int, num_decode: int, *, group_settings: Any = None, **spec: Any) -> ClusterSpec:
    """Workers ``w-0``, ``w-1``...: first those that prefill."""
    return ClusterSpec(groups=(group(num_prefill, num_decode, **(group_settings or {})),), **spec)


def trace(*requests: tuple[float, int, int] | TraceRequest, hash_block_tokens: int = 4) -> Trace:
    """Of (arrival, prompt, output)."""
    rows = [
        row
        if isinstance(row, TraceRequest)
        else TraceRequest(arrival_s=row[0], prompt_tokens=row[1], output_tokens=row[2])
        for row in requests
    ]
    return Trace(name="t", requests=tuple(rows), hash_block_tokens=hash_block_tokens)


class Computed(StepTime):
    """Counts the tokens of the steps that are planned."""

    def __init__(self, step_time: StepTime = STEP) -> None:
        self._step_time = step_time
        self.num_tokens = 0

    def step_s(self, prefills: Sequence[PrefillChunk], num_decoding: int, decode_kv_tokens: int) -> float:
        self.num_tokens += sum(chunk.num_tokens for chunk in prefills) + num_decoding
        return self._step_time.step_s(prefills, num_decoding, decode_kv_tokens)


class CheckedSimulation(Simulation):
    """Holds the laws of every worker against each of its moments."""

    def __init__(
        self,
        what: Trace,
        spec: ClusterSpec,
        actions: Sequence[Action] = (),
        seed: int = 0,
        make_planner: MakePlanner = Planner,
    ) -> None:
        super().__init__(what, spec, LeastLoadPolicy, actions, seed, None, make_planner)
        self.num_events = 0
        checked = self

        class CheckedQueue(EventQueue):
            __slots__ = ()

            def run_next(self) -> None:
                before_s = self.now_s
                super().run_next()
                assert self.now_s >= before_s
                checked.num_events += 1
                checked.check_workers()

        self.queue.__class__ = CheckedQueue

    def run_to(self, time_s: float) -> None:
        """The simulation up to a time, to be looked at."""
        self.start()
        self.queue.run_until(time_s)

    def check_workers(self) -> None:
        now_s = self.queue.now_s
        for worker in self.cluster.workers():
            load, config = worker.load(), worker.group.worker
            assert 0 <= load.kv_used_blocks <= config.num_kv_blocks
            assert 0 <= load.num_running <= config.max_num_seqs
            assert load.num_waiting >= 0
            assert load.waiting_prefill_tokens >= 0
            assert len(worker.legs) == load.num_running + load.num_waiting
            assert 0 <= worker.reservations.num_promised_tokens <= config.kv_capacity_tokens
            if worker.model.step is None and worker.legs and now_s > worker.stalled_until_s:
                plan = copy.deepcopy(worker.model).plan_step(now_s)
                assert plan.step is None, "idle with runnable work"
                assert not plan.pulls, "idle with a pull to start"

    def assert_nothing_is_left(self, after_s: float) -> None:
        """No living worker holds anything ``after_s`` after the end."""
        self.settle(after_s)
        for worker in self.cluster.workers():
            load = worker.load()
            held = (load.num_running, load.num_waiting, load.waiting_prefill_tokens)
            assert held == (0, 0, 0)
            assert (load.kv_used_blocks, load.num_pinned) == (0, 0)
            assert worker.model.drained
            assert not worker.legs
            assert not worker.watchers
            assert not worker.kept_pins
            assert worker.reservations.num_promised_tokens == 0
        assert not any(router.num_ongoing for router in self.routers)


def run(what: Trace, spec: ClusterSpec, *actions: Action, seed: int = 0) -> SimulationResult:
    """Simulates, checked at every event and until nothing is left."""
    simulation = CheckedSimulation(what, spec, actions, seed)
    result = simulation.run()
    simulation.assert_nothing_is_left(after_s=200.0)
    return result
