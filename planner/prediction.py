"""How many requests a split would serve within both targets: a queue of prompts and a loss system of answers.

Prompts wait for the prefill workers, which take them as fast as full steps go. Answers need a place in a
decode worker's batch, which has as many as steps within the TPOT target allow. Decode workers prefill
what the prefill workers cannot, for a share of their time that leaves them the fewer places; the share that
serves most is taken, as routers find it by trying. What waits already is work that comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.capacity import DecodeCapacity, PrefillCapacity, WorkerKind, decode_capacities, prefill_capacity
from planner.demand import Forecast
from planner.queueing import lost_share
from planner.split import PlannedSplit

Floats = npt.NDArray[np.float64]

PROMPT_TIME_SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
"""Shares of decode workers' time spent on prompts that are tried."""
OVERHEAD_S = 0.006
"""Router and network, from arrival to the prefill worker and back."""
LOCAL_TPOT_MARGIN = 0.9
"""Decode workers prefill by themselves up to this share of the TPOT target, others decode to 0.95."""
ANSWER_VARIATION = 2.0
"""ca2 + cs2 of answers: lengths are about exponential."""
ANSWER_PATIENCE = 0.5
"""Share of the TTFT target for which a request can wait for a place in a batch."""
HORIZON_S = 15.0
"""How far ahead is looked: the load is taken to stay so long as it is forecast."""
BACKLOG_S = 5.0
"""Seconds over which prompts that wait beyond their time count as load."""
_TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Of one model."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """What goes on now."""

    waiting_prompt_tokens: float = 0.0
    """Prompt tokens in routers' lines and workers' queues."""
    num_decoding: float | None = None
    """Answers that go on on decode workers; None: as many as the load brings in the long run..."""
    num_decode_workers: int = 1
    """...and on how many workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one split."""

    attainment: float
    """Share of all requests within both targets, over all scenarios, 0 to 1."""
    prefill_use: float
    """Prompt work that is expected over what prefill workers can do; may pass 1; huge without any."""
    decode_use: float


Predict = Callable[
    [Mapping[str, WorkerKind], Sequence[PlannedSplit], Forecast, ClusterState], list[Prediction]
]
"""Predicts each split; :class:`QueueingPredictor` is one."""


class QueueingPredictor:
    """Predicts by queueing formulas.

    Args:
        targets: of the model.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets

    def __call__(
        self,
        kinds: Mapping[str, WorkerKind],
        splits: Sequence[PlannedSplit],
        forecast: Forecast,
        state: ClusterState,
    ) -> list[Prediction]:
        """Predicts each split; all have the shapes of ``kinds``, which are at least one."""
        demand = forecast.demand
        shapes = list(kinds)
        prefill = [prefill_capacity(kinds[shape], demand) for shape in shapes]
        decode = [
            decode_capacities(
                kinds[shape],
                demand,
                self._targets.tpot_s,
                [1 - (1 - share) * _margin(share) for share in PROMPT_TIME_SHARES],
            )
            for shape in shapes
        ]
        pools = _Pools(self._targets, forecast, splits, list(kinds), prefill, decode, state)
        factors = np.array([(s.prefill_factor, s.decode_factor) for s in forecast.scenarios])
        weights = np.array([scenario.weight for scenario in forecast.scenarios])
        # Axes: split, scenario, share of decode workers' time spent on prompts.
        prompts = demand.rate_rps * factors[:, 0][None, :, None]
        answers = demand.rate_rps * factors[:, 1][None, :, None]
        # As many prompts as come within the target may wait and be in time.
        num_waiting = state.waiting_prompt_tokens / max(demand.prompt_tokens, 1.0)
        backlog = max(num_waiting - demand.rate_rps * self._targets.ttft_s, 0.0) / BACKLOG_S
        # What is lost on one side no longer burdens the other: routers refuse before they send.
        prefilled = pools.prefilled(prompts + backlog)
        answered = pools.answered(answers)
        attained = np.maximum(
            prefilled * pools.answered(answers * prefilled),
            answered * pools.prefilled((prompts + backlog) * answered),
        )
        attainment = attained.max(axis=2) @ weights
        prefill_use, decode_use = pools.use(demand.rate_rps)
        return [
            Prediction(attainment=float(a), prefill_use=float(p), decode_use=float(d))
            for a, p, d in zip(attainment, prefill_use, decode_use, strict=True)
        ]


class _Pools:
    """Prefill and decode workers of each split; arrays have the axes split, scenario, share of time."""

    def __init__(
        self,
        targets: Targets,
        forecast: Forecast,
        splits: Sequence[PlannedSplit],
        shapes: Sequence[str],
        prefill: Sequence[PrefillCapacity],
        decode: Sequence[Sequence[DecodeCapacity]],
        state: ClusterState,
    ) -> None:
        num_prefill = _counts(splits, shapes, "num_prefill")
        num_decode = _counts(splits, shapes, "num_decode")
        shares = np.array(PROMPT_TIME_SHARES)
        self._prompt_shares = np.array([kind.share for kind in forecast.demand.prompts])
        self._slack_s = targets.ttft_s - OVERHEAD_S - np.min([c.alone_s for c in prefill], axis=0)
        self._variation = forecast.demand.arrival_dispersion + max(c.variation for c in prefill)
        self._answer_slack_s = ANSWER_PATIENCE * targets.ttft_s
        self._num_prefill = num_prefill.sum(1)[:, None, None]
        self._prefill_rps = (num_prefill @ np.array([1.0 / c.mean_s for c in prefill]))[:, None, None]
        self._num_decode = num_decode.sum(1)[:, None, None]
        alone_s = np.array([float(self._prompt_shares @ c.alone_s) for c in prefill])
        self._local_rps = (num_decode @ (1.0 / alone_s))[:, None, None]
        """Prompts that decode workers could compute if they did nothing else, one at a time..."""
        added_rps = num_decode @ np.array([1.0 / c.mean_added_s for c in prefill])
        self._local_limit_rps = (added_rps[:, None] * shares)[:, None, :]
        """...and in the share of their time that they have for it, beside their batches."""
        slots = np.array([[c.num_slots for c in capacities] for capacities in decode])
        rates = np.array([[c.num_slots / c.answer_s for c in capacities] for capacities in decode])
        self._slots = (num_decode @ slots)[:, None, :]
        self._answer_rps = (num_decode @ rates)[:, None, :]
        self._num_decoding: Floats | None = None
        """Answers that go on now on workers that will decode."""
        if state.num_decoding is not None:
            staying = np.minimum(num_decode.sum(1) / max(state.num_decode_workers, 1), 1.0)
            self._num_decoding = (state.num_decoding * staying)[:, None, None]

    def use(self, rate_rps: float) -> tuple[Floats, Floats]:
        """Work over capacity of both roles, by split, without local prefill."""
        prefill = rate_rps / np.maximum(self._prefill_rps[:, 0, 0], _TINY)
        return prefill, rate_rps / np.maximum(self._answer_rps[:, 0, 0], _TINY)

    def prefilled(self, offered_rps: Floats) -> Floats:
        """Share of prompts that get their first token in time."""
        own_lost = self._late(offered_rps, self._num_prefill, self._prefill_rps)
        never = float(self._prompt_shares @ (self._slack_s < 0))  # too long to be in time anywhere
        may_be_helped = np.maximum(own_lost - never, 0.0)
        overflow_rps = offered_rps * may_be_helped
        local_lost = lost_share(
            overflow_rps / np.maximum(self._local_rps, _TINY),
            np.maximum(self._num_decode, _TINY),
            np.zeros(1),
            2.0,
        )
        most = self._local_limit_rps / np.maximum(overflow_rps, _TINY)
        helped = may_be_helped * np.minimum(1.0 - local_lost, most)
        # Without prefill workers prompts queue for the decode workers.
        share = self._local_limit_rps / np.maximum(self._local_rps, _TINY)
        alone = 1.0 - self._late(offered_rps, self._num_decode * share, self._local_limit_rps)
        return np.where(self._num_prefill > 0, 1.0 - own_lost + helped, alone)

    def answered(self, offered_rps: Floats) -> Floats:
        """Share of answers that find a place in a batch."""
        service_s = self._slots / np.maximum(self._answer_rps, _TINY)
        lost = lost_share(
            offered_rps / np.maximum(self._answer_rps, _TINY),
            np.maximum(self._slots, _TINY),
            self._answer_slack_s / np.maximum(service_s, _TINY),
            ANSWER_VARIATION,
        )
        if self._num_decoding is not None:
            lost = _lost_until_horizon(
                lost, self._num_decoding, offered_rps * service_s, self._slots, service_s
            )
        return np.where(self._answer_rps <= 0.0, 0.0, 1.0 - lost)

    def _late(self, offered_rps: Floats, servers: Floats, rate_rps: Floats) -> Floats:
        """Share of prompts that a queue does not serve in time; all of them where nobody serves."""
        service_s = np.maximum(servers / np.maximum(rate_rps, _TINY), _TINY)
        lost = lost_share(
            (offered_rps / np.maximum(rate_rps, _TINY))[..., None],
            np.maximum(servers, _TINY)[..., None],
            self._slack_s / service_s[..., None],
            self._variation,
        )
        return np.where(rate_rps <= 0.0, 1.0, lost @ self._prompt_shares)


def _lost_until_horizon(
    lost: Floats, num_now: Floats, num_later: Floats, slots: Floats, answer_s: Floats
) -> Floats:
    """Share of answers that find no place before the horizon, from the share in the long run.

    The number of answers that go on tends from ``num_now`` to ``num_later`` within about an answer's time.
    Where that is more than there are places, nothing is lost until they are full. Where there are more
    answers than places now, nothing finds a place until enough have ended.
    """
    full = num_later > slots
    with np.errstate(divide="ignore", invalid="ignore"):
        turns_s = answer_s * np.log((num_now - num_later) / (slots - num_later))
    turns = np.where(full == (num_now < slots), np.nan_to_num(turns_s, nan=0.0, posinf=HORIZON_S), 0.0)
    share = np.clip(turns / HORIZON_S, 0.0, 1.0)
    return np.where(full, (1.0 - share) * lost, share + (1.0 - share) * lost)


def _margin(share: float) -> float:
    return LOCAL_TPOT_MARGIN if share else 1.0


def _counts(splits: Sequence[PlannedSplit], shapes: Sequence[str], name: str) -> Floats:
    return np.array([[getattr(split.of(shape), name) for shape in shapes] for split in splits], dtype=float)
