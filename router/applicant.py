"""What admission control knows of a request that wants to be sent."""

from __future__ import annotations

from typing import Protocol

from core.errors import NoWorkerAvailable, Rejected
from router.placement import Placement


class Applicant(Protocol):
    """A request that wants to be sent. Its attributes do not change."""

    @property
    def request_id(self) -> str: ...

    @property
    def tenant(self) -> str: ...

    @property
    def priority(self) -> int:
        """Lower is more urgent, 0 is usual: vLLM's ``priority``."""

    @property
    def arrival_s(self) -> float:
        """On the controller's clock."""

    @property
    def ttft_slo_s(self) -> float:
        """From arrival; inf for none."""

    @property
    def prompt_tokens(self) -> int: ...

    def place(self, now_s: float) -> Placement:
        """Where it would go now.

        Args:
            now_s: one time for all that are tried together. Were it later for those behind, room that comes
                meanwhile would be theirs.

        Raises:
            core.errors.NoWorkerAvailable: nobody serves it.
        """

    def send(self, placement: Placement) -> None:
        """It has waited and goes now. Must book it on the workers (``WorkerView.prefill_sent`` and so on)
        before returning: the next one is placed right after. Must not call the controller."""

    def refuse(self, error: Rejected | NoWorkerAvailable) -> None:
        """It has waited in vain. Must not call the controller."""
