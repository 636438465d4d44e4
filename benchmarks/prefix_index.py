"""What the router's prefix index costs: memory, lookups and updates, and naming a prompt's blocks."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil

from benchmarks.table import Table, ms, percentile
from core.prompt_blocks import chain_states, root_state
from router.block_rows import States
from router.prefix_guess import PrefixKnowledge

NUM_ENTRIES = 10_000_000
QUICK_NUM_ENTRIES = 300_000
NUM_WORKERS = 256
PROMPT_BLOCKS = 4096
BLOCK_SIZE_TOKENS = 16
LAYOUTS = {
    "one worker a prompt": 1,
    "8 workers a prompt": 8,
    "256 workers a prompt, each to its own depth": 256,
    "another set of workers at every block": -1,
}
"""How many hold a prompt; the last is the worst there is: one worker holds all, others every other block."""
UPDATE_BLOCKS = (1, 16, 256, 4096)
NUM_TIMED = 1000
_BIG_WORKER_BLOCKS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """CPU seconds of the thread, whoever else wants the core."""

    p50_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutCost:
    num_entries: int
    """Pairs of a block and a worker that holds it."""
    num_blocks: int
    """Different blocks."""
    rss_bytes: int
    """By which the process grew."""
    fill_s: float
    longest_store_s: float
    known: Times
    """Match of a whole prompt that is held, by ``PrefixKnowledge``, guesses included."""
    unknown: Times
    updates: dict[int, Times]
    """A batch stored and another evicted, by blocks in each."""
    removal_s: float
    """Of a worker with 100,000 blocks."""
    after_removal: Times
    """Updates of 16 blocks while its rows are swept up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    naming: dict[str, Times]
    """Of a prompt's blocks, by what holds its tokens."""
    layouts: dict[str, LayoutCost]


def measure(num_entries: int, progress: Callable[[str], None]) -> Costs:
    """Each layout in a process of its own, so that memory is its own."""
    layouts = {}
    for name, num_holders in LAYOUTS.items():
        progress(f"prefix index: {name}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            layouts[name] = pool.submit(measure_layout, num_holders, num_entries).result()
    return Costs(naming=_naming(), layouts=layouts)


def measure_layout(num_holders: int, num_entries: int) -> LayoutCost:
    rng = np.random.default_rng(1)
    gc.collect()
    rss_before = psutil.Process().memory_info().rss
    known = PrefixKnowledge()
    for number in range(NUM_WORKERS):
        known.set_worker(str(number), _BIG_WORKER_BLOCKS)
        known.replace(str(number), np.empty(0, np.uint64))
    prompts: list[int] = []
    stored, stores_s = 0, []
    started_s = time.thread_time()
    while stored < num_entries:
        prompts.append(len(prompts))
        for worker, states in _placed(len(prompts) - 1, num_holders, rng):
            stores_s.append(_seconds(known.store, worker, states))
            stored += len(states)
    fill_s = time.thread_time() - started_s
    gc.collect()
    rss_bytes = psutil.Process().memory_info().rss - rss_before
    held = [_prompt(number) for number in rng.choice(prompts, min(NUM_TIMED, len(prompts)), replace=False)]
    strange = [_prompt(-1 - number) for number in range(200)]
    for states in strange[100:]:
        known.sent("7", states[: _BIG_WORKER_BLOCKS // 100], 0.0)
    known_times = _times(lambda n: known.match(held[n % len(held)], 1.0))
    unknown_times = _times(lambda n: known.match(strange[n % 100], 1.0))
    num_blocks = known.num_known_blocks
    updates = {size: _update_times(known, size, rng) for size in UPDATE_BLOCKS}
    known.set_worker("big", _BIG_WORKER_BLOCKS)
    known.replace("big", _names(_BIG_WORKER_BLOCKS, rng))
    removal_s = _seconds(known.remove_worker, "big")
    return LayoutCost(
        num_entries=stored,
        num_blocks=num_blocks,
        rss_bytes=rss_bytes,
        fill_s=fill_s,
        longest_store_s=max(stores_s),
        known=known_times,
        unknown=unknown_times,
        updates=updates,
        removal_s=removal_s,
        after_removal=_update_times(known, 16, rng),
    )


def tables(costs: Costs) -> list[Table]:
    memory = [
        (
            name,
            f"{cost.num_entries / 1e6:.1f}",
            f"{cost.num_blocks / 1e6:.2f}",
            f"{cost.rss_bytes / 2**20:,.0f}",
            ms(cost.known.p50_s),
            ms(cost.known.p99_s),
            ms(cost.unknown.p99_s),
        )
        for name, cost in costs.layouts.items()
    ]
    updates = [
        (
            name,
            *(f"{1e6 * cost.updates[size].p50_s:.0f}" for size in UPDATE_BLOCKS),
            ms(cost.longest_store_s),
            ms(cost.removal_s),
            ms(cost.after_removal.p99_s),
        )
        for name, cost in costs.layouts.items()
    ]
    naming = [(name, ms(times.p50_s), ms(times.p99_s)) for name, times in costs.naming.items()]
    return [
        Table(
            f"Prefix index: {NUM_WORKERS} workers, prompts of {PROMPT_BLOCKS:,} blocks",
            [
                "who holds what",
                "M entries",
                "M blocks",
                "MiB",
                "match, ms p50",
                "p99",
                "unknown prompt, p99",
            ],
            memory,
        ),
        Table(
            "Updates of the prefix index: blocks stored and as many evicted",
            [
                "who holds what",
                *(f"{size:,} blocks, µs" for size in UPDATE_BLOCKS),
                "longest of filling, ms",
                "removing 100,000 blocks, ms",
                "16 blocks after that, ms p99",
            ],
            updates,
        ),
        Table(f"Naming {PROMPT_BLOCKS * BLOCK_SIZE_TOKENS:,} tokens", ["held in", "ms p50", "p99"], naming),
    ]


def as_json(costs: Costs) -> dict[str, Any]:
    return asdict(costs)


def _placed(number: int, num_holders: int, rng: np.random.Generator) -> Iterator[tuple[str, States]]:
    states = _prompt(number)
    if num_holders < 0:
        yield "0", states
    for worker in rng.choice(NUM_WORKERS, abs(num_holders), replace=False) if num_holders > 0 else ():
        yield str(worker), states[: rng.integers(1, PROMPT_BLOCKS)] if num_holders == NUM_WORKERS else states
    for worker in range(1, NUM_WORKERS) if num_holders < 0 else ():
        yield str(worker), states[rng.random(PROMPT_BLOCKS) < 0.5]


def _prompt(number: int) -> States:
    return np.random.default_rng(abs(number) * 2 + (number < 0) + 10).integers(
        1, 2**64, PROMPT_BLOCKS, dtype=np.uint64
    )


def _names(count: int, rng: np.random.Generator) -> States:
    return rng.integers(1, 2**64, count, dtype=np.uint64)


def _naming() -> dict[str, Times]:
    tokens = np.random.default_rng(2).integers(0, 128_000, PROMPT_BLOCKS * BLOCK_SIZE_TOKENS)
    root = root_state(model="m")
    held = {"a list": tokens.tolist(), "an int32 array": tokens.astype(np.int32)}
    return {
        name: _times(lambda _: chain_states(root, held[name], BLOCK_SIZE_TOKENS), 200)  # noqa: B023
        for name in held
    }


def _update_times(known: PrefixKnowledge, size: int, rng: np.random.Generator) -> Times:
    batches = [_names(size, rng) for _ in range(min(NUM_TIMED, 2_000_000 // size))]
    lag = len(batches) // 2

    def update(number: int) -> None:
        known.store(str(number % NUM_WORKERS), batches[number])
        if number >= lag:
            known.evict(str((number - lag) % NUM_WORKERS), batches[number - lag])

    return _times(update, len(batches))


def _times(act: Callable[[int], object], count: int = NUM_TIMED) -> Times:
    seconds = [_seconds(act, number) for number in range(count)]
    return Times(p50_s=percentile(seconds, 50), p99_s=percentile(seconds, 99), max_s=max(seconds))


def _seconds(act: Callable[..., object], *arguments: object) -> float:
    started_s = time.thread_time()
    act(*arguments)
    return time.thread_time() - started_s
