"""Simulates splits, several at a time in processes of their own.

The processes hold one end of a pipe whose other end only the parent has. They end when that end closes:
on purpose, or because the parent is gone.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from router.policy import LeastLoadPolicy
from simulator.planning.search import EvaluateAll, Evaluation, Score
from simulator.planning.split import Split
from simulator.reports.summary import summarize
from simulator.result import Slo
from simulator.scenario import static_cluster
from simulator.simulation import MakePolicy, simulate
from simulator.traces.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRuns:
    """What all simulations of a plan have in common; goes to other processes."""

    trace: Trace
    slo: Slo
    seed: int = 0
    make_policy: MakePolicy = LeastLoadPolicy

    def run(self, split: Split) -> Evaluation:
        """Simulates the trace on one split."""
        spec = static_cluster(
            self.trace,
            prefill=split.prefill_profile,
            num_prefill=split.num_prefill,
            decode=split.decode_profile,
            num_decode=split.num_decode,
        )
        result = simulate(self.trace, spec, make_policy=self.make_policy, seed=self.seed)
        settings = {"split": split.label, "seed": self.seed, "trace": self.trace.name}
        summary = summarize(result, self.slo, settings=settings)
        return Evaluation(score=score_of(summary, self.slo), summary=summary)


def score_of(summary: dict[str, Any], slo: Slo) -> Score:
    """The score of a run from :func:`simulator.reports.summary.summarize`'s figures."""

    def of(name: str, percentile: str, *, missing: float) -> float:
        value = summary[name][percentile] if summary[name] else None
        return missing if value is None else float(value) / 1e3

    ttft_p99_s = of("ttft_ms", "p99", missing=math.inf)
    tpot_p99_s = of("tpot_ms", "p99", missing=0.0)  # none where every answer is one token
    return Score(
        attainment=summary["attainment"] or 0.0,
        goodput_rps=summary["goodput_rps"] or 0.0,
        ttft_p90_s=of("ttft_ms", "p90", missing=math.inf),
        ttft_use=ttft_p99_s / slo.ttft_s,
        tpot_use=tpot_p99_s / slo.tpot_s,
    )


@contextlib.contextmanager
def evaluator(
    runs: SplitRuns, jobs: int | None, on_done: Callable[[Split, Evaluation], None]
) -> Iterator[EvaluateAll]:
    """Scores splits by simulation.

    Args:
        runs: what to simulate.
        jobs: processes; None: as many as there are cores. Results do not depend on it.
        on_done: told of each split in the order asked for, as soon as it and those before it are done.
    """
    jobs = _num_cores() if jobs is None else jobs
    if jobs <= 1:
        yield lambda splits: _in_turn(splits, map(runs.run, splits), on_done)
        return
    context = get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(runs, reader))

    def evaluate(splits: Sequence[Split]) -> list[Evaluation]:
        futures = [pool.submit(_run, split) for split in splits]
        return _in_turn(splits, map(Future.result, futures), on_done)

    try:
        yield evaluate
        pool.shutdown()
    finally:
        writer.close()
        reader.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _in_turn(
    splits: Sequence[Split], evaluations: Iterator[Evaluation], on_done: Callable[[Split, Evaluation], None]
) -> list[Evaluation]:
    done = []
    for split, evaluation in zip(splits, evaluations, strict=True):
        on_done(split, evaluation)
        done.append(evaluation)
    return done


def _num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_runs: SplitRuns | None = None


def _begin(runs: SplitRuns, parent: Connection) -> None:
    global _runs
    _runs = runs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and closes the pipe
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)


def _run(split: Split) -> Evaluation:
    assert _runs is not None
    return _runs.run(split)
