"""How many requests of a trace could have met their targets at best: a bound for every routing policy.

What a routed run must obey, and what is left out. A request that meets its targets had its prompt computed
between its arrival and its TTFT target, and its answer decoded by the time that TPOT target allows. Both
took computing time of some worker:

    prompt   the profile's time for its tokens behind the longest prefix that any other request could have
             left in a cache by then: one that arrived before this request's target. Steps are filled with
             prompts to the token budget, so that their constant is shared by as many as can share it.
    answer   one share of a decode step a token: at most what the profile asks for one more sequence and
             its KV, in however large a batch.

Everything else is free: caches never evict and hold for all workers, KV moves in no time, a worker that
decodes loses nothing by prefilling, all workers together are one machine of their joint speed, which knows
the future and drops whom it likes. Each freedom only adds schedules, so no policy on real workers meets more.

Two relaxations of that are solved exactly, and the smaller answer counts:

    prompts alone     Each prompt must run between arrival and target on the one machine. Targets come in
                      order of arrival, so the algorithm of Kise, Ibaraki and Mine (Operations Research 26,
                      1978) finds the most prompts in time: in order of arrival, and whenever one is late
                      the one goes whose absence lets the rest end soonest.
    prompts and       All work of requests that must end by some time t fits what the machine can do until
    answers           t. The cheapest ones are taken first; the least over many t counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.performance_model import PrefillChunk, StepTime
from simulator.result import Slo
from simulator.spec import ClusterSpec
from simulator.traces.trace import Trace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_UNCOUNTED_TOKENS = 2
"""Of each prompt: a chunk of one token runs as a decode, and a prompt can have two of them."""
_NUM_HORIZONS = 64
_BATCHES = (*range(1, 32), *range(32, 1025, 8))
_KV_SHARES = np.linspace(0.0, 1.0, 65)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShare:
    """A decode step takes at least ``step_s + seq_s * batch + kv_token_s * KV tokens``."""

    step_s: float
    seq_s: float
    kv_token_s: float


def most_in_time(trace: Trace, spec: ClusterSpec, slo: Slo, cached_tokens: Ints) -> int:
    """Requests that can meet both targets, at most.

    Args:
        trace: what arrives.
        spec: workers of one group.
        cached_tokens: prompt tokens that need not be computed, by request; see ``reusable_tokens``.
    """
    work = _Work.of(trace, spec, slo, cached_tokens)
    (group,) = spec.groups
    num_workers = sum(group.num_workers.values())
    able = np.flatnonzero(work.alone_s <= work.window_s)
    release_s = work.release_s[able]
    prompts = most_jobs_in_time(release_s, work.prompt_s[able] / num_workers, work.window_s)
    return min(prompts, _most_by_horizon(work, able, num_workers))


def reusable_tokens(trace: Trace, within_s: float) -> Ints:
    """Leading prompt tokens, in whole pieces, that others can have left in a cache: shape (requests,).

    Args:
        within_s: requests that arrive up to this long after one may still have computed for it.
    """
    requests = trace.requests
    first_s: dict[int, list[float]] = {}
    for request in requests:
        for piece in request.block_hashes:
            arrivals_s = first_s.setdefault(piece, [])
            if len(arrivals_s) < 2:
                arrivals_s.append(request.arrival_s)
    reusable = []
    for request in requests:
        limit = (request.prompt_tokens - 1) // trace.hash_block_tokens
        num = 0
        for piece in request.block_hashes[:limit]:
            arrivals_s = first_s[piece]
            others_s = arrivals_s[1:] if arrivals_s[0] == request.arrival_s else arrivals_s
            if not others_s or others_s[0] > request.arrival_s + within_s:
                break
            num += 1
        reusable.append(num * trace.hash_block_tokens)
    return np.array(reusable, dtype=np.int64)


def most_jobs_in_time(release_s: Floats, work_s: Floats, window_s: float) -> int:
    """Most jobs that one machine can do, each within ``window_s`` of its release.

    Args:
        release_s: in order, shape (jobs,).
        work_s: shape (jobs,).
    """
    num_done = 0
    block: list[int] = []
    starts_s = np.empty(0)
    free_s = -np.inf
    for job in range(len(release_s)):
        if free_s <= release_s[job]:
            num_done += len(block)
            block, starts_s, free_s = [], np.empty(0), release_s[job]
        block.append(job)
        starts_s = np.append(starts_s, free_s)
        free_s += work_s[job]
        if free_s > release_s[job] + window_s:
            releases_s, works_s = release_s[block], work_s[block]
            slack_s = np.append(np.minimum.accumulate((starts_s - releases_s)[:0:-1])[::-1], np.inf)
            gone = int(np.minimum(works_s, slack_s).argmax())
            del block[gone]
            releases_s, works_s = np.delete(releases_s, gone), np.delete(works_s, gone)
            before_s = np.cumsum(works_s) - works_s
            starts_s = before_s + np.maximum.accumulate(releases_s - before_s)
            free_s = starts_s[-1] + works_s[-1] if block else -np.inf
    return num_done + len(block)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What each request asks of the workers; arrays of shape (requests,)."""

    release_s: Floats
    window_s: float
    """From a prompt's release to when its first token must leave the worker."""
    alone_s: Floats
    """A prompt on an idle worker."""
    prompt_s: Floats
    answer_s: Floats
    end_s: Floats
    """When the whole answer must be there."""

    @staticmethod
    def of(trace: Trace, spec: ClusterSpec, slo: Slo, cached_tokens: Ints) -> _Work:
        (group,) = spec.groups
        step_time, worker = next(iter(group.step_time.values())), group.worker
        share = decode_share(step_time, worker.kv_capacity_tokens)
        idle_s = step_time.step_s((), 0, 0)
        release_s, alone_s, prompt_s, answer_s, end_s = [], [], [], [], []
        for request, cached in zip(trace.requests, cached_tokens.tolist(), strict=True):
            num_tokens = request.prompt_tokens - cached
            alone_s.append(step_time.step_s((_chunk(cached, num_tokens, True),), 0, 0))
            counted = max(0, num_tokens - _UNCOUNTED_TOKENS)
            chunk_s = step_time.step_s((_chunk(cached, counted, False),), 0, 0) - idle_s
            prompt_s.append(chunk_s + share.step_s * counted / worker.max_num_batched_tokens)
            num_decoded = request.output_tokens - 1
            kv_tokens = num_decoded * request.prompt_tokens + num_decoded * (num_decoded - 1) / 2
            answer_s.append(share.seq_s * num_decoded + share.kv_token_s * kv_tokens)
            release_s.append(request.arrival_s + spec.router_s + spec.rpc_s)
            end_s.append(request.arrival_s + slo.ttft_s + slo.tpot_s * num_decoded)
        return _Work(
            release_s=np.array(release_s),
            window_s=slo.ttft_s - spec.router_s - 2 * spec.rpc_s,
            alone_s=np.array(alone_s),
            prompt_s=np.array(prompt_s),
            answer_s=np.array(answer_s),
            end_s=np.array(end_s),
        )


def decode_share(step_time: StepTime, kv_capacity_tokens: int) -> DecodeShare:
    """The plane through the profile's decode steps, pushed down until none lies under it."""
    points = [
        (1.0, float(batch), share * kv_capacity_tokens, 0.0)
        for batch in _BATCHES
        for share in _KV_SHARES
        if share * kv_capacity_tokens >= batch
    ]
    grid = np.array(points)
    grid[:, 3] = [step_time.step_s((), int(batch), int(kv)) for _, batch, kv, _ in points]
    base_s = step_time.step_s((), 0, 0)
    plane, *_ = np.linalg.lstsq(grid[:, 1:3], grid[:, 3] - base_s, rcond=None)
    plane = np.maximum(plane, 0.0)
    scale = min(1.0, float((grid[:, 3] / (base_s + grid[:, 1:3] @ plane)).min()))
    return DecodeShare(step_s=scale * base_s, seq_s=scale * plane[0], kv_token_s=scale * plane[1])


def _most_by_horizon(work: _Work, able: Ints, num_workers: int) -> int:
    total_s, end_s = (work.prompt_s + work.answer_s)[able], work.end_s[able]
    start_s = work.release_s[0] if len(work.release_s) else 0.0
    least = len(able)
    for horizon_s in np.quantile(end_s, np.linspace(0.05, 1.0, _NUM_HORIZONS)) if len(able) else ():
        inside = end_s <= horizon_s
        fits = np.cumsum(np.sort(total_s[inside])) <= num_workers * (horizon_s - start_s)
        least = min(least, int(fits.sum()) + int((~inside).sum()))
    return least


def _chunk(context_tokens: int, num_tokens: int, ends_prompt: bool) -> PrefillChunk:
    return PrefillChunk(context_tokens=context_tokens, num_tokens=num_tokens, ends_prompt=ends_prompt)
