"""What one routing decision costs a router: 256 workers, 64k tokens, prefixes cached here and there."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.routing_runs import PROFILE, SLO
from benchmarks.table import Table, ms, percentile
from core.clock import ManualClock
from core.prompt_blocks import chain_states, root_state
from core.step_times import StepTimes
from core.table_step_time import TableStepTime
from core.types import Role, WorkerLoad, WorkerReport
from router.block_rows import States
from router.policy_predictive import PredictivePolicy
from router.prefix_guess import PrefixKnowledge
from router.routing import RoutingRequest
from router.worker_view import WorkerView
from simulator.profiles.files import find_profile

NUM_WORKERS = 256
NUM_PREFILL = 160
PROMPT_TOKENS = 65_536
BLOCK_SIZE_TOKENS = 16
NUM_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE_TOKENS
NUM_PROMPTS = 100
DECISIONS, QUICK_DECISIONS = 5000, 1000
NEWS = 64
"""Workers heard of between two decisions."""
CASES = {
    "nobody has it cached": 0,
    "8 workers have it cached": 8,
    "every worker has it cached to its own depth": NUM_WORKERS,
}
_QUEUES_S = {"prefill workers in time": 0.2, "all late": 20.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU seconds of one part of a decision: of the router's thread, whoever else wants the core."""

    p50_s: float
    p99_s: float
    max_s: float


Costs = dict[str, dict[str, Cost]]
"""By case, by part."""


def measure(num_decisions: int, progress: Callable[[str], None]) -> Costs:
    costs: Costs = {}
    for queues, longest_queue_s in _QUEUES_S.items():
        for holders, num_holders in CASES.items():
            name = f"{holders}, {queues}"
            progress(name)
            costs[name] = _measure_case(num_holders, longest_queue_s, num_decisions)
    return costs


def _measure_case(num_holders: int, longest_queue_s: float, num_decisions: int) -> dict[str, Cost]:
    rng = np.random.default_rng(1)
    clock = ManualClock(100.0)
    views = _views(clock, longest_queue_s, rng)
    prompts = [_prompt(number) for number in range(NUM_PROMPTS)]
    prefixes = _prefixes(prompts, num_holders, rng)
    policy = PredictivePolicy(random_seed=1)
    seconds: dict[str, list[float]] = {"match": [], "candidates": [], "choose": [], "whole": []}
    gc.collect()
    for number in range(num_decisions):
        for worker in rng.choice(NUM_WORKERS, NEWS, replace=False):
            views[worker].on_load(views[worker].load)
        times_s = [time.thread_time()]
        matched = prefixes.match(prompts[number % NUM_PROMPTS], clock.now_s())
        cached_tokens = {worker_id: num * BLOCK_SIZE_TOKENS for worker_id, num in matched.items()}
        times_s.append(time.thread_time())
        candidates = [view.candidate() for view in views]
        times_s.append(time.thread_time())
        request = RoutingRequest(
            prompt_tokens=PROMPT_TOKENS,
            now_s=clock.now_s(),
            cached_tokens=cached_tokens,
            ttft_slo_s=10 * SLO.ttft_s,
            tpot_slo_s=SLO.tpot_s,
        )
        policy.choose(candidates, request)
        times_s.append(time.thread_time())
        for part, spent_s in zip(seconds, np.diff(times_s).tolist(), strict=False):
            seconds[part].append(spent_s)
        seconds["whole"].append(times_s[-1] - times_s[0])
    return {part: _cost(spent_s) for part, spent_s in seconds.items()}


def _views(clock: ManualClock, longest_queue_s: float, rng: np.random.Generator) -> list[WorkerView]:
    profile = find_profile(PROFILE)
    config = profile.worker_model_config()
    step_time = TableStepTime(profile)
    step_times = StepTimes(lambda _: step_time)
    report = WorkerReport(
        worker_id="",
        incarnation="",
        model="",
        revision="",
        shape="",
        allowed_roles=frozenset(Role),
        role=Role.PREFILL,
        role_assigned=True,
        draining=False,
        address="",
        node_id="",
        metrics_address="",
        block_size_tokens=config.block_size_tokens,
        num_kv_blocks=config.num_kv_blocks,
        bytes_per_block=profile.kv_bytes_per_token * config.block_size_tokens,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    views = []
    for number in range(NUM_WORKERS):
        role = Role.PREFILL if number < NUM_PREFILL else Role.DECODE
        load = WorkerLoad(
            num_running=int(rng.integers(1, 100)),
            kv_used_blocks=int(rng.integers(1000, config.num_kv_blocks // 2)),
        )
        view = WorkerView(replace(report, worker_id=str(number), role=role, load=load), clock, step_times)
        if role is Role.PREFILL:
            view.prefill_sent("0", PROMPT_TOKENS, longest_queue_s * rng.uniform(0.5, 1.0))
        views.append(view)
    return views


def _prefixes(prompts: list[States], num_holders: int, rng: np.random.Generator) -> PrefixKnowledge:
    prefixes = PrefixKnowledge()
    for number in range(NUM_WORKERS):
        prefixes.set_worker(str(number), 2 * NUM_PROMPTS * NUM_BLOCKS)
        prefixes.replace(str(number), np.empty(0, np.uint64))
    for states in prompts:
        for worker in rng.choice(NUM_WORKERS, num_holders, replace=False):
            depth = NUM_BLOCKS if num_holders < NUM_WORKERS else int(rng.integers(1, NUM_BLOCKS))
            prefixes.store(str(worker), states[:depth])
    return prefixes


def _prompt(number: int) -> States:
    tokens = np.random.default_rng(number).integers(0, 128_000, PROMPT_TOKENS)
    return chain_states(root_state(model="m"), tokens, BLOCK_SIZE_TOKENS)


def _cost(seconds: list[float]) -> Cost:
    return Cost(p50_s=percentile(seconds, 50), p99_s=percentile(seconds, 99), max_s=max(seconds))


def tables(costs: Costs) -> list[Table]:
    rows = [
        (
            name,
            *(ms(parts[part].p50_s) for part in ("match", "candidates", "choose")),
            ms(parts["whole"].p50_s),
            f"**{ms(parts['whole'].p99_s)}**",
        )
        for name, parts in costs.items()
    ]
    title = (
        f"One decision, ms of CPU time: {NUM_WORKERS} workers, {PROMPT_TOKENS:,} tokens, blocks named before"
    )
    headers = ["case", "prefixes p50", "loads p50", "policy p50", "whole p50", "whole p99"]
    return [Table(title, headers, rows)]


def as_json(costs: Costs) -> dict[str, Any]:
    return {name: {part: asdict(cost) for part, cost in parts.items()} for name, parts in costs.items()}
