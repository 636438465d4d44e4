"""The routing policy: filter, score, pick; and which path a request may take."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from core.errors import NoWorkerAvailable
from core.request import Path
from core.types import Role
from router.disaggregation import SamplingFacts, choose_path
from router.policy import LeastLoadPolicy
from router.routing import Candidate, RoutingRequest

IDLE = Candidate(
    worker_id="",
    role=Role.PREFILL,
    num_requests=0,
    waiting_prefill_tokens=0,
    kv_used_tokens=0,
    kv_capacity_tokens=10_000,
)

REQUEST = RoutingRequest(prompt_tokens=10)


def worker(worker_id: str, role: Role, **load: int) -> Candidate:
    return replace(IDLE, worker_id=worker_id, role=role, **load)


@pytest.fixture
def policy() -> LeastLoadPolicy:
    return LeastLoadPolicy(random_seed=1)


def test_the_prefill_worker_with_the_shortest_queue_is_picked(policy: LeastLoadPolicy) -> None:
    candidates = [
        worker("p1", Role.PREFILL, waiting_prefill_tokens=500),
        worker("p2", Role.PREFILL, waiting_prefill_tokens=100),
        worker("d1", Role.DECODE),
    ]
    assert policy.choose(candidates, REQUEST).prefill_worker == "p2"


def test_the_decode_worker_with_the_most_room_is_picked(policy: LeastLoadPolicy) -> None:
    candidates = [
        worker("d1", Role.DECODE, kv_used_tokens=9_000, num_requests=2),
        worker("d2", Role.DECODE, kv_used_tokens=1_000, num_requests=2),
    ]
    assert policy.choose(candidates, REQUEST).decode_worker == "d2"


def test_without_a_prefill_worker_the_decode_worker_prefills(policy: LeastLoadPolicy) -> None:
    decision = policy.choose([worker("d1", Role.DECODE)], REQUEST)
    assert (decision.decode_worker, decision.prefill_worker) == ("d1", None)


def test_without_a_decode_worker_there_is_no_decision(policy: LeastLoadPolicy) -> None:
    with pytest.raises(NoWorkerAvailable, match="decode"):
        policy.choose([worker("p1", Role.PREFILL)], REQUEST)


def test_workers_that_failed_the_request_are_left_out(policy: LeastLoadPolicy) -> None:
    candidates = [worker("p1", Role.PREFILL), worker("p2", Role.PREFILL), worker("d1", Role.DECODE)]
    assert policy.choose(candidates, REQUEST, excluded=["p1"]).prefill_worker == "p2"
    with pytest.raises(NoWorkerAvailable):
        policy.choose(candidates, REQUEST, excluded=["d1"])


def test_equal_workers_share_the_load(policy: LeastLoadPolicy) -> None:
    candidates = [worker(f"p{n}", Role.PREFILL) for n in range(4)] + [worker("d", Role.DECODE)]
    picks = Counter(policy.choose(candidates, REQUEST).prefill_worker for _ in range(400))
    assert min(picks.values()) > 60


def test_one_token_answers_go_to_prefill_workers_while_there_are_any(policy: LeastLoadPolicy) -> None:
    both = [worker("p1", Role.PREFILL, num_requests=50), worker("d1", Role.DECODE)]
    assert policy.choose_prefill_only(both, REQUEST) == "p1"
    assert policy.choose_prefill_only(both[1:], REQUEST) == "d1"
    with pytest.raises(NoWorkerAvailable):
        policy.choose_prefill_only([], REQUEST)


@pytest.mark.parametrize(
    ("facts", "path"),
    [
        (SamplingFacts(max_tokens=16), Path.REMOTE_EARLY),
        (SamplingFacts(max_tokens=16, depends_on_output_history=True), Path.REMOTE),
        (SamplingFacts(max_tokens=1), Path.PREFILL_ONLY),
        (SamplingFacts(max_tokens=1, needs_whole_prompt=True), Path.LOCAL),
        (SamplingFacts(max_tokens=16, num_siblings=2), Path.LOCAL),
        (SamplingFacts(max_tokens=1, num_siblings=2), Path.LOCAL),
    ],
)
def test_the_path_follows_from_what_sampling_needs(facts: SamplingFacts, path: Path) -> None:
    assert choose_path(facts) is path
