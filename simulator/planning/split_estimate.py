"""How a split would do, guessed in milliseconds: a replay of the prefill queue, Little's law for decode.

Prefill: each prompt's time alone, less what a cache would hold if requests went round robin; workers
take from one queue what fits into a step. Decode: for each stretch of the trace the batch at which the
tokens asked for are made as fast as they come, its step time, and its KV. Guesses rank splits and say where
to start; they decide nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from core.performance_model import PrefillChunk
from core.performance_profile import PerformanceProfile
from core.table_step_time import TableStepTime
from simulator.planning.split import Split
from simulator.result import Floats, Slo
from simulator.traces.trace import Trace

OVERHEAD_S = 0.006
"""Router and network, from arrival to the prefill worker and back."""
_STRETCH_S = 20.0
_MAX_STRETCHES = 1000
_NUM_FIXPOINT_STEPS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitEstimate:
    """A guess."""

    attainment: float
    pressure: float
    """The worse of p99 TTFT and p99 TPOT, as a multiple of its target."""
    prefill_utilisation: float
    """Share of prefill workers' time that the prompts take, alone and one after another; may pass 1."""
    decode_utilisation: float
    """Tokens asked for over tokens made at the largest batch that meets TPOT and fits into KV; may pass 1."""

    @property
    def rank(self) -> tuple[float, float, float]:
        """Higher is better."""
        return self.attainment, -self.pressure, -max(self.prefill_utilisation, self.decode_utilisation)


class SplitEstimator:
    """Guesses for one trace and one SLO."""

    def __init__(self, trace: Trace, slo: Slo) -> None:
        self._trace = trace
        self._slo = slo
        requests = trace.requests
        self._arrivals_s = [request.arrival_s for request in requests]
        self._prompts = np.array([request.prompt_tokens for request in requests], dtype=np.int64)
        self._outputs = np.array([request.output_tokens for request in requests], dtype=np.int64)
        self._span_s = max(trace.duration_s - self._arrivals_s[0], 1.0) if requests else 1.0
        stretch_s = max(_STRETCH_S, self._span_s / _MAX_STRETCHES)
        self._stretch_s = min(stretch_s, self._span_s)
        self._stretch = (np.array(self._arrivals_s) // self._stretch_s).astype(np.int64)
        self._num_decodes = np.maximum(self._outputs - 1, 0)
        self._tables: dict[str, TableStepTime] = {}
        self._alone: dict[tuple[str, int], Floats] = {}

    def __call__(self, split: Split) -> SplitEstimate:
        together = split.num_prefill == 0
        num_prefill = split.num_prefill or split.num_decode
        alone_s = self.prefill_s(split.prefill_profile, num_prefill)
        prefill_use = float(alone_s.sum()) / (self._span_s * num_prefill)
        ttft_s = self._ttft_s(split.prefill_profile, num_prefill, alone_s)
        busy = self._busy(alone_s, num_prefill) if together else np.zeros(int(self._stretch[-1]) + 1)
        tpot_s = self._tpot_s(split.decode_profile, split.num_decode, busy)[self._stretch]
        met = (ttft_s <= self._slo.ttft_s) & ((self._outputs <= 1) | (tpot_s <= self._slo.tpot_s))
        pressure = max(
            float(np.quantile(ttft_s, 0.99, method="inverted_cdf")) / self._slo.ttft_s,
            float(np.quantile(tpot_s, 0.99, method="inverted_cdf")) / self._slo.tpot_s,
        )
        return SplitEstimate(
            attainment=float(met.mean()),
            pressure=pressure,
            prefill_utilisation=prefill_use,
            decode_utilisation=self._decode_use(split, prefill_use if together else 0.0),
        )

    # ------------------------------------------------------------------------------------ prefill

    def prefill_s(self, profile: PerformanceProfile, num_workers: int) -> Floats:
        """Seconds each prompt takes alone on an idle worker that has seen its share of the trace."""
        # Shares of caches between two powers of 2 are near enough to each other.
        group = 1 << (num_workers.bit_length() - 1) if self._trace_shares() else 1
        if (profile.name, group) not in self._alone:
            cached = cached_tokens(self._trace, group, profile.kv_capacity_tokens)
            table = self._table(profile)
            chunk_tokens = profile.max_num_batched_tokens
            seconds = [
                prompt_s(table, prompt, cached_here, chunk_tokens)
                for prompt, cached_here in zip(self._prompts.tolist(), cached, strict=True)
            ]
            self._alone[profile.name, group] = np.array(seconds)
        return self._alone[profile.name, group]

    def _ttft_s(self, profile: PerformanceProfile, num_workers: int, alone_s: Floats) -> Floats:
        """TTFT if idle workers take from one queue what fits into a step and is their share of it."""
        table, limit_tokens = self._table(profile), profile.max_num_batched_tokens
        base_s = min(prompt_s(table, 1, 0, limit_tokens), float(alone_s.min()))
        arrivals_s, prompts, seconds = self._arrivals_s, self._prompts.tolist(), alone_s.tolist()
        num_requests = len(arrivals_s)
        free_s = [0.0] * num_workers
        ttft_s = np.empty(num_requests)
        first = last = 0
        while first < num_requests:
            start_s = max(heapq.heappop(free_s), arrivals_s[first])
            while last < num_requests and arrivals_s[last] <= start_s:
                last += 1
            most = first + math.ceil((last - first) / num_workers)
            end_s, num_tokens, index = start_s + seconds[first], prompts[first], first + 1
            while index < most and num_tokens + prompts[index] <= limit_tokens:
                end_s += seconds[index] - base_s
                num_tokens += prompts[index]
                index += 1
            for place in range(first, index):
                ttft_s[place] = end_s - arrivals_s[place] + OVERHEAD_S
            first = index
            last = max(last, first)
            heapq.heappush(free_s, end_s)
        return ttft_s

    def _busy(self, alone_s: Floats, num_workers: int) -> Floats:
        """Share of workers' time that prompts take, by stretch; below 1."""
        work_s = np.bincount(self._stretch, weights=alone_s)
        return np.minimum(work_s / (self._stretch_s * num_workers), 0.95)

    # ------------------------------------------------------------------------------------- decode

    def _tpot_s(self, profile: PerformanceProfile, num_workers: int, busy: Floats) -> Floats:
        """Step time by stretch; inf where the batch would not fit."""
        table = self._table(profile)
        tokens = np.bincount(self._stretch, weights=self._num_decodes)
        kv_tokens = np.bincount(
            self._stretch, weights=self._num_decodes * (self._prompts + self._outputs / 2)
        ) / np.maximum(tokens, 1)
        rates = tokens / (self._stretch_s * num_workers)
        return np.array(
            [
                self._sustained_s(profile, table, rate, kv, 1 - used)
                for rate, kv, used in zip(rates.tolist(), kv_tokens.tolist(), busy.tolist(), strict=True)
            ]
        )

    def _sustained_s(
        self, profile: PerformanceProfile, table: TableStepTime, rate: float, kv_tokens: float, share: float
    ) -> float:
        """Seconds a token takes at the batch that makes ``rate`` tokens/s in ``share`` of the time."""
        most = _max_batch(profile, kv_tokens)
        batch = 1.0
        for _ in range(_NUM_FIXPOINT_STEPS):
            num = max(1, math.ceil(batch))
            step_s = table.step_s((), num, int(num * kv_tokens)) / share
            wanted = rate * step_s
            if wanted <= batch or num > most:
                break
            batch = wanted
        return math.inf if batch > most else step_s

    def _decode_use(self, split: Split, busy: float) -> float:
        profile = split.decode_profile
        num_tokens = int(self._num_decodes.sum())
        if not num_tokens:
            return 0.0
        kv_tokens = float((self._num_decodes * (self._prompts + self._outputs / 2)).sum()) / num_tokens
        table = self._table(profile)
        low, high = 1, max(1, _max_batch(profile, kv_tokens))
        while low < high:
            middle = (low + high + 1) // 2
            if table.step_s((), middle, int(middle * kv_tokens)) <= self._slo.tpot_s:
                low = middle
            else:
                high = middle - 1
        most_per_s = low / table.step_s((), low, int(low * kv_tokens))
        wanted_per_s = num_tokens / (self._span_s * split.num_decode)
        return wanted_per_s / (most_per_s * max(1 - busy, 0.05))

    # ------------------------------------------------------------------------------------- shared

    def _table(self, profile: PerformanceProfile) -> TableStepTime:
        if profile.name not in self._tables:
            self._tables[profile.name] = TableStepTime(profile)
        return self._tables[profile.name]

    def _trace_shares(self) -> bool:
        return any(request.block_hashes for request in self._trace.requests)


def _max_batch(profile: PerformanceProfile, kv_tokens: float) -> int:
    return min(profile.max_num_seqs, int(profile.kv_capacity_tokens / max(kv_tokens, 1.0)))


def prompt_s(table: TableStepTime, prompt_tokens: int, num_cached: int, chunk_tokens: int) -> float:
    """Seconds a prompt takes alone, in chunks of at most ``chunk_tokens``, behind ``num_cached`` tokens."""
    seconds = 0.0
    while num_cached < prompt_tokens:
        num_tokens = min(chunk_tokens, prompt_tokens - num_cached)
        chunk = PrefillChunk(
            context_tokens=num_cached,
            num_tokens=num_tokens,
            ends_prompt=num_cached + num_tokens == prompt_tokens,
        )
        seconds += table.step_s((chunk,), 0, 0)
        num_cached += num_tokens
    return seconds


def cached_tokens(trace: Trace, num_workers: int, capacity_tokens: float) -> list[int]:
    """Tokens of each prompt that its worker's cache holds; requests go round robin, oldest blocks go first.

    At least a prompt's last token is always computed.
    """
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_workers)]
    block_tokens = trace.hash_block_tokens
    counts = []
    for number, request in enumerate(trace.requests):
        cache, num_hit, whole = caches[number % num_workers], 0, True
        for block in request.block_hashes:
            whole = whole and block in cache
            num_hit += whole
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) * block_tokens > capacity_tokens:
            cache.popitem(last=False)
        counts.append(min(num_hit * block_tokens, request.prompt_tokens - 1))
    return counts
