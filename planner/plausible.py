"""What reports can be true. A worker or router that says what cannot be is not gone by, and does no harm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from core.traffic import ANSWER_CLASS_LIMITS, PROMPT_CLASS_LIMITS, TrafficSummary
from core.types import WorkerLoad, WorkerReport
from planner.observation import ObservedRouter, ObservedWorker

Ints = npt.NDArray[np.int64]

_MOST = 1 << 62
_MOST_TOKENS = 10**12
"""Waiting somewhere."""
_MOST_AT_ONCE = 10**7
"""Requests between two looks."""
_LONGEST = 1 << 30
"""Tokens of a prompt or answer beyond the last class."""
_PROMPT_LIMITS = np.array((*PROMPT_CLASS_LIMITS, _LONGEST))
_ANSWER_LIMITS = np.array((*ANSWER_CLASS_LIMITS, _LONGEST))
PROMPT_ROWS = ("num_arrived", "prompt_tokens", "placed_tokens", "cached_tokens")
ANSWER_ROWS = ("num_reached", "num_ended", "ended_tokens")
_TOTALS = ("output_tokens", "kv_tokens", "num_waiting", "num_ongoing")


def plausible_worker(worker: ObservedWorker) -> ObservedWorker:
    """The worker; one whose load cannot be true as if it were idle, for it is there all the same."""
    report, load = worker.report, worker.report.load
    if (
        _is_count(load.num_running, report.max_num_seqs)
        and _is_count(load.num_decoding, report.num_kv_blocks)
        and _is_count(load.num_waiting)
        and _is_count(load.waiting_prefill_tokens, _MOST_TOKENS)
    ):
        return worker
    return replace(worker, report=replace(report, load=WorkerLoad()))


def has_plausible_sizes(report: WorkerReport) -> bool:
    """Whether a worker of such sizes could run anything."""
    sizes = (report.max_num_seqs, report.max_num_batched_tokens, report.num_kv_blocks)
    positive = all(_is_count(size) and size > 0 for size in (*sizes, report.block_size_tokens))
    return positive and _is_count(report.bytes_per_block)


def is_plausible(router: ObservedRouter) -> bool:
    """Whether a router's summary has only counts."""
    traffic = router.traffic
    totals = [getattr(traffic, name) for name in _TOTALS]
    if not all(map(_is_count, totals)) or not _is_count(traffic.waiting_prompt_tokens, _MOST_TOKENS):
        return False
    return all(
        len(row) == num and all(map(_is_count, row))
        for names, num in ((PROMPT_ROWS, len(_PROMPT_LIMITS)), (ANSWER_ROWS, len(_ANSWER_LIMITS)))
        for row in (getattr(traffic, name) for name in names)
    )


def plausible_growth(prompts: Ints, answers: Ints) -> bool:
    """Whether counts can have grown by so much: none has fallen, and lengths are those of their classes."""
    num_arrived, prompt_tokens, placed, cached = prompts
    reached, ended, ended_tokens = answers
    if (prompts < 0).any() or (answers < 0).any() or max(num_arrived.max(), reached.max()) > _MOST_AT_ONCE:
        return False
    possible = (prompt_tokens <= num_arrived * _PROMPT_LIMITS) & (cached <= placed)
    return bool(possible.all()) and bool((ended_tokens <= ended * _ANSWER_LIMITS).all())


def prompt_rows(traffic: TrafficSummary) -> Ints:
    """Counts by class of prompt, a row each of ``PROMPT_ROWS``."""
    return np.array([getattr(traffic, name) for name in PROMPT_ROWS], dtype=np.int64)


def answer_rows(traffic: TrafficSummary) -> Ints:
    """Counts by class of answer, a row each of ``ANSWER_ROWS``."""
    return np.array([getattr(traffic, name) for name in ANSWER_ROWS], dtype=np.int64)


def _is_count(number: object, most: int = _MOST) -> bool:
    return isinstance(number, int | np.integer) and bool(0 <= number <= most)
