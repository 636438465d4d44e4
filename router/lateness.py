"""How late first tokens are to be expected, and what late ones have taught."""

from __future__ import annotations

import math

from core.clock import Clock
from router.admission_limits import AdmissionLimits
from router.applicant import Applicant
from router.placement import Placement
from router.prediction_margin import PredictionMargin
from router.waiting_line import Entry

_MIN_ANSWER_TOKENS = 8
_MOST_OF_SLACK = 0.5
"""Of the time that a request could wait and still be in time, no more than this is kept as a margin: where
nothing else runs, everybody is let in, whatever the past has taught."""


class Lateness:
    """What one router predicts of requests for one model, and how careful it has learned to be.

    Args:
        limits: what is too late.
        clock: the one that arrivals are told on.
    """

    def __init__(self, limits: AdmissionLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        now_s = clock.now_s()
        self._ttft_margin_s = PredictionMargin(now_s, step=0.03, highest=1.0, share=0.9)
        self._tpot_margin = PredictionMargin(now_s, step=0.05, highest=2.0, share=0.95)

    def answered(self, predicted_ttft_s: float, ttft_s: float) -> None:
        """A first token came, ``ttft_s`` after arrival; ``predicted_ttft_s`` is the placement's it was sent
        with. Not to be told of requests that had to be sent a second time."""
        now_s = self._clock.now_s()
        too_low = ttft_s > predicted_ttft_s + self._ttft_margin_s.at(now_s)
        self._ttft_margin_s.observe(now_s, too_low=too_low)

    def finished(self, tpot_s: float, aimed_tpot_s: float, num_tokens: int) -> None:
        """An answer has ended, with this mean time between its tokens.

        It was let in long ago, perhaps with less care than now: that it was late then is no news.
        Short answers say nothing: most of their time is the handoff's, which no smaller batch shortens.

        Args:
            aimed_tpot_s: its target, by :meth:`tpot_factor` as of when it was placed.
        """
        if num_tokens >= _MIN_ANSWER_TOKENS:
            now_s = self._clock.now_s()
            too_low = tpot_s > aimed_tpot_s * (1.0 + self._tpot_margin.at(now_s))
            self._tpot_margin.observe(now_s, too_low=too_low)

    def tpot_factor(self) -> float:
        """By how much TPOT targets are to be divided before anything is decided for a request, 1 or more."""
        return 1.0 + self._tpot_margin.at(self._clock.now_s())

    def patience_s(self, applicant: Applicant, placement: Placement) -> float:
        """From arrival, until when a first token is in time.

        What misses its target on an idle cluster too is not refused for ever: it gets twice as long as it
        would take there.
        """
        target_s = self._limits.reject_above * applicant.ttft_slo_s
        alone_s = placement.work_s or 0.0
        return 2.0 * alone_s if alone_s > target_s else target_s

    def late_s(self, applicant: Applicant, placement: Placement, now_s: float) -> float:
        """How much too late its first token would come if it were sent now; negative: in time."""
        if not self._limits.early_rejection:
            return -math.inf
        ttft_s = now_s - applicant.arrival_s if placement.ttft_s is None else placement.ttft_s
        return ttft_s - self.patience_s(applicant, placement)

    def margin_s(self, applicant: Applicant, placement: Placement, now_s: float) -> float:
        """By how much its first token is to be expected later than predicted."""
        return self._margin_s(self.patience_s(applicant, placement) - (placement.work_s or 0.0), now_s)

    def surely_in_time(self, entry: Entry[Applicant], now_s: float) -> bool:
        """Whether one that waits would be in time if its turn were now, however low predictions are."""
        if not self._limits.early_rejection:
            return True
        slack_s = entry.deadline_s - entry.item.arrival_s - entry.work
        return now_s + entry.work + self._margin_s(slack_s, now_s) <= entry.deadline_s

    def _margin_s(self, slack_s: float, now_s: float) -> float:
        return min(self._ttft_margin_s.at(now_s), _MOST_OF_SLACK * slack_s)
