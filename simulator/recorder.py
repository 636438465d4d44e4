"""Writes down what happens to requests, as cheaply as the hottest loop of the simulator needs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core.request import Path
from simulator.result import Demands, Gaps, Outcome, RequestTable
from simulator.traces.trace import TraceRequest

_NAN = float("nan")


class Recorder:
    """Columns of one run, a row a request of the trace."""

    def __init__(self, requests: Sequence[TraceRequest]) -> None:
        num = len(requests)
        self._requests = requests
        self.num_open = num
        """Requests that have not ended."""
        self.last_end_s = 0.0
        """When the last request so far ended."""
        self.num_recomputed = 0
        self.num_preemptions = 0
        self._first_token_s = [_NAN] * num
        self._end_s = [_NAN] * num
        self._num_tokens = [0] * num
        self._cached_tokens = [0] * num
        self._outcome = [""] * num
        self._path = [Path.NONE.value] * num
        self._prefill_queue_s = [_NAN] * num
        self._transfer_s = [_NAN] * num
        self._refusal: dict[int, str] = {}
        self._token_s = array("d")
        """Times of tokens, run after run; a run begins with the time its first gap is counted from."""
        self._run_lengths = array("q")
        self._run_weights = array("q")

    def first_token(self, index: int, now_s: float) -> None:
        self._first_token_s[index] = now_s

    def prefilled(self, index: int, cached_tokens: int, queue_s: float) -> None:
        self._cached_tokens[index] = cached_tokens
        self._prefill_queue_s[index] = queue_s

    def path(self, index: int, path: Path) -> None:
        self._path[index] = path.value

    def pulled(self, index: int, transfer_s: float) -> None:
        self._transfer_s[index] = transfer_s

    def gap(self, from_s: float, to_s: float) -> None:
        """A request got a token at ``from_s`` and its next one at ``to_s``."""
        self.gaps_in_a_row(from_s, (to_s,), 1)

    def gaps_in_a_row(self, from_s: float, ends_s: Sequence[float], weight: int) -> None:
        """``weight`` requests got a token at ``from_s`` and one at each of ``ends_s``."""
        self._token_s.append(from_s)
        self._token_s.extend(ends_s)
        self._run_lengths.append(len(ends_s) + 1)
        self._run_weights.append(weight)

    def done(self, index: int, now_s: float) -> None:
        self._end(index, now_s, Outcome.DONE, self._requests[index].output_tokens)

    def not_done(self, index: int, now_s: float, outcome: Outcome, num_tokens: int) -> None:
        self._end(index, now_s, outcome, num_tokens)

    def refused(self, index: int, reason: str) -> None:
        """Admission control has told why; :meth:`not_done` follows."""
        self._refusal[index] = reason

    def _end(self, index: int, now_s: float, outcome: Outcome, num_tokens: int) -> None:
        assert not self._outcome[index], f"request {index} ended twice"
        self._outcome[index] = outcome.value
        self._end_s[index] = now_s
        self.last_end_s = max(self.last_end_s, now_s)
        self._num_tokens[index] = num_tokens
        self.num_open -= 1

    def request_table(self) -> RequestTable:
        arrival_s = np.array([request.arrival_s for request in self._requests], dtype=np.float64)
        first_s, end_s = np.array(self._first_token_s), np.array(self._end_s)
        num_tokens = np.array(self._num_tokens, dtype=np.int64)
        outcome = np.array(self._outcome, dtype=np.str_)
        several = (num_tokens > 1) & (outcome == Outcome.DONE.value)
        tpot_s = np.full(len(arrival_s), np.nan)
        tpot_s[several] = (end_s[several] - first_s[several]) / (num_tokens[several] - 1)
        return RequestTable(
            arrival_s=arrival_s,
            ttft_s=first_s - arrival_s,
            tpot_s=tpot_s,
            e2e_s=np.where(outcome == Outcome.DONE.value, end_s - arrival_s, np.nan),
            prompt_tokens=np.array([r.prompt_tokens for r in self._requests], dtype=np.int64),
            output_tokens=num_tokens,
            cached_tokens=np.array(self._cached_tokens, dtype=np.int64),
            outcome=outcome,
            path=np.array(self._path, dtype=np.str_),
            prefill_queue_s=np.array(self._prefill_queue_s),
            transfer_s=np.array(self._transfer_s),
            refusal=self._refusals(),
            demands=_demands(self._requests),
        )

    def _refusals(self) -> npt.NDArray[np.str_] | None:
        if not self._refusal:
            return None
        return np.array([self._refusal.get(index, "") for index in range(len(self._requests))], dtype=np.str_)

    def gaps(self) -> Gaps:
        lengths = np.frombuffer(self._run_lengths, dtype=np.int64)
        inside = np.ones(len(self._token_s), dtype=np.bool_)
        inside[np.cumsum(lengths) - lengths] = False
        gap_s = np.diff(np.frombuffer(self._token_s, dtype=np.float64), prepend=0.0)
        weight = np.repeat(np.frombuffer(self._run_weights, dtype=np.int64), lengths)
        return Gaps(gap_s=gap_s[inside], weight=weight[inside])


def _demands(requests: Sequence[TraceRequest]) -> Demands | None:
    """None if no request asks for anything of its own."""
    if not any(r.tenant or r.priority or r.ttft_slo_s or r.tpot_slo_s for r in requests):
        return None
    return Demands(
        tenant=np.array([r.tenant for r in requests], dtype=np.str_),
        priority=np.array([r.priority for r in requests], dtype=np.int64),
        ttft_slo_s=np.array([r.ttft_slo_s or _NAN for r in requests]),
        tpot_slo_s=np.array([r.tpot_slo_s or _NAN for r in requests]),
    )
