"""Baton with one prefill and one decode worker against plain vLLM with one engine, in the same minutes.

Rounds are interleaved: every round runs every cell (prompt length x concurrency) on both systems, one
after the other, with the same prompts, and starts with the other system than the round before. Ratios
are taken within a round, so that a slow minute of the machine hits both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.answers import Answer
from benchmarks.load import LoadGenerator
from benchmarks.model import PromptMaker
from benchmarks.table import Table, median, ms, percentile

OUTPUT_TOKENS = 32
PLAIN, BATON = "plain vLLM", "Baton"


@dataclass(frozen=True, slots=True)
class Cell:
    """One load: what is sent, by how many clients, how often a round."""

    prompt_tokens: int
    concurrency: int
    requests: int

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens} x {self.concurrency}"


CELLS = (
    Cell(200, 1, 6),
    Cell(800, 1, 4),
    Cell(2500, 1, 2),
    Cell(200, 4, 12),
    Cell(800, 4, 8),
    Cell(2500, 4, 8),
)
ROUNDS, QUICK_ROUNDS = 6, 2


@dataclass(frozen=True, slots=True)
class Run:
    """One system's answers to one cell of one round."""

    answers: Sequence[Answer]

    @property
    def tokens_per_s(self) -> float:
        span_s = max(a.end_s for a in self.answers) - min(a.sent_s for a in self.answers)
        return sum(a.output_tokens for a in self.answers) / span_s


Runs = Mapping[str, Mapping[str, Sequence[Run]]]
"""By cell name, then by system: one run a round."""


def measure(
    load: LoadGenerator,
    prompts: PromptMaker,
    ports: Mapping[str, int],
    rounds: int,
    progress: Callable[[str], None],
) -> Runs:
    """Runs the rounds, and one before them that warms up and does not count.

    Args:
        ports: HTTP port by system.
    """
    runs: dict[str, dict[str, list[Run]]] = {cell.name: {name: [] for name in ports} for cell in CELLS}
    for round_ in range(rounds + 1):
        for cell in CELLS:
            num_requests = cell.requests if round_ else cell.concurrency
            bodies = [prompts.chat(cell.prompt_tokens, max_tokens=OUTPUT_TOKENS) for _ in range(num_requests)]
            for name in list(ports)[:: 1 if round_ % 2 else -1]:
                progress(f"latency: round {round_} of {rounds}, {cell.name}, {name}")
                answers = load.run(ports[name], bodies, concurrency=cell.concurrency)
                if round_:
                    runs[cell.name][name].append(Run(answers))
    return runs


def summarize(runs: Runs) -> dict[str, Any]:
    """Medians, percentiles and ratios by cell; times in seconds."""
    summary: dict[str, Any] = {}
    for cell, by_system in runs.items():
        cell_summary: dict[str, Any] = {}
        for name, system_runs in by_system.items():
            answers = [answer for run in system_runs for answer in run.answers]
            cell_summary[name] = {
                "requests": len(answers),
                "ttft_p50_s": median(a.ttft_s for a in answers),
                "ttft_p90_s": percentile((a.ttft_s for a in answers), 90),
                "tpot_p50_s": median(a.tpot_s for a in answers),
                "largest_gap_p50_s": median(a.largest_gap_s for a in answers),
                "largest_gap_max_s": max(a.largest_gap_s for a in answers),
                "tokens_per_s": median(run.tokens_per_s for run in system_runs),
            }
        pairs = list(zip(by_system[PLAIN], by_system[BATON], strict=True))
        cell_summary["ratio"] = {
            "ttft": _ratio(pairs, lambda run: median(a.ttft_s for a in run.answers)),
            "tpot": _ratio(pairs, lambda run: median(a.tpot_s for a in run.answers)),
            "tokens_per_s": _ratio(pairs, lambda run: run.tokens_per_s),
        }
        summary[cell] = cell_summary
    return summary


def _ratio(pairs: Sequence[tuple[Run, Run]], value: Callable[[Run], float]) -> float:
    """Baton over plain vLLM: the median of the rounds' own ratios."""
    return median(value(baton) / value(plain) for plain, baton in pairs)


def tables(summary: Mapping[str, Any]) -> list[Table]:
    ttft, decode = [], []
    for cell, values in summary.items():
        plain, baton, ratio = values[PLAIN], values[BATON], values["ratio"]
        ttft.append(
            [
                cell, ms(plain["ttft_p50_s"]), ms(baton["ttft_p50_s"]), f"**{ratio['ttft']:.2f}**",
                ms(plain["ttft_p90_s"]), ms(baton["ttft_p90_s"]),
            ]
        )  # fmt: skip
        decode.append(
            [
                cell, ms(plain["tpot_p50_s"]), ms(baton["tpot_p50_s"]), f"**{ratio['tpot']:.2f}**",
                ms(plain["largest_gap_p50_s"]), ms(baton["largest_gap_p50_s"]),
                f"{plain['tokens_per_s']:.0f}", f"{baton['tokens_per_s']:.0f}",
                f"**{ratio['tokens_per_s']:.2f}**",
            ]
        )  # fmt: skip
    return [
        Table(
            "Time to first token, ms",
            ["prompt tokens x clients", "plain p50", "Baton p50", "ratio", "plain p90", "Baton p90"],
            ttft,
        ),
        Table(
            "After the first token: TPOT and largest gap of a request in ms (p50), output tokens per second",
            [
                "prompt tokens x clients", "plain TPOT", "Baton TPOT", "ratio", "plain gap", "Baton gap",
                "plain tok/s", "Baton tok/s", "ratio",
            ],
            decode,
        ),
    ]  # fmt: skip
