"""The bound of the routing benchmark: exact where it can be, and above whatever a policy reaches."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.routing_bound import decode_share, most_in_time, most_jobs_in_time, reusable_tokens
from core.table_step_time import TableStepTime
from router.policies import POLICY_NAMES, make_policy
from simulator.profiles.files import find_profile
from simulator.reports.summary import slo_met
from simulator.result import Slo
from simulator.scenario import static_cluster
from simulator.simulation import simulate
from simulator.traces.trace import Trace, TraceRequest

PROFILE = find_profile("h200-llama-3.1-8b-fp8-tp1")
SLO = Slo(ttft_s=0.5, tpot_s=0.03)


def most_by_trying_all(release_s: list[float], work_s: list[float], window_s: float) -> int:
    """Jobs in order of release are in time if any order has them in time: deadlines have that order too."""
    for size in range(len(release_s), 0, -1):
        for chosen in combinations(range(len(release_s)), size):
            free_s = 0.0
            for job in chosen:
                free_s = max(free_s, release_s[job]) + work_s[job]
                if free_s > release_s[job] + window_s:
                    break
            else:
                return size
    return 0


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), max_size=9),
    st.integers(1, 10),
)
def test_as_many_jobs_as_the_best_choice_gets_in_time(jobs: list[tuple[int, int]], window: int) -> None:
    jobs = sorted(jobs)
    jobs = [(release, work) for release, work in jobs if work <= window]
    release_s, work_s = [float(job[0]) for job in jobs], [float(job[1]) for job in jobs]
    best = most_jobs_in_time(np.array(release_s), np.array(work_s), float(window))
    assert best == most_by_trying_all(release_s, work_s, float(window))


def test_a_prefix_is_reusable_if_another_request_may_have_computed_it() -> None:
    trace = Trace(
        name="t",
        requests=(
            TraceRequest(arrival_s=0.0, prompt_tokens=10, output_tokens=1, block_hashes=(1, 2)),
            TraceRequest(arrival_s=0.1, prompt_tokens=12, output_tokens=1, block_hashes=(1, 2, 3)),
            TraceRequest(arrival_s=9.0, prompt_tokens=12, output_tokens=1, block_hashes=(1, 2, 3)),
            TraceRequest(arrival_s=9.9, prompt_tokens=8, output_tokens=1, block_hashes=(7, 8)),
        ),
        hash_block_tokens=4,
    )
    # The first may still wait when the second comes; a prompt's last token is always computed.
    assert reusable_tokens(trace, within_s=0.5).tolist() == [8, 8, 8, 0]
    assert reusable_tokens(trace, within_s=0.01).tolist() == [0, 8, 8, 0]


def test_no_decode_step_is_cheaper_than_its_shares() -> None:
    step_time, capacity = TableStepTime(PROFILE), PROFILE.worker_model_config().kv_capacity_tokens
    share = decode_share(step_time, capacity)
    rng = np.random.default_rng(1)
    for batch, part in zip(rng.integers(1, 1025, 500).tolist(), rng.random(500).tolist(), strict=True):
        kv_tokens = max(batch, int(part * capacity))
        least_s = share.step_s + share.seq_s * batch + share.kv_token_s * kv_tokens
        # Between the points it was made of, the profile's plane may bend by a little.
        assert step_time.step_s((), batch, kv_tokens) >= 0.99 * least_s


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("gap_s", [0.02, 0.1])
def test_no_policy_is_above_the_bound(policy: str, gap_s: float) -> None:
    rng = np.random.default_rng(3)
    requests = []
    for number in range(300):
        pieces = int(rng.integers(1, 30))
        first = int(rng.integers(0, 6)) * 1000
        requests.append(
            TraceRequest(
                arrival_s=number * gap_s,
                prompt_tokens=pieces * 512 + 100,
                output_tokens=int(rng.integers(1, 200)),
                block_hashes=tuple(range(first, first + pieces)),
            )
        )
    trace = Trace(name="t", requests=tuple(requests))
    spec = static_cluster(
        trace, prefill=PROFILE, num_prefill=2, decode=PROFILE, num_decode=1, ttft_slo_s=0.5, tpot_slo_s=0.03
    )
    result = simulate(trace, spec, make_policy=lambda seed: make_policy(policy, seed))
    ttft_met, tpot_met = slo_met(result.requests, SLO)
    bound = most_in_time(trace, spec, SLO, reusable_tokens(trace, SLO.ttft_s))
    assert int((ttft_met & tpot_met).sum()) <= bound <= len(requests)
