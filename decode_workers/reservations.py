"""KV room promised to sequences that are still being prefilled elsewhere."""

from __future__ import annotations

from core.clock import Clock
from core.errors import Overloaded


class Reservations:
    """Promises of KV tokens, each until it is used, cancelled or too old.

    Args:
        capacity_tokens: the engine's whole KV cache.
        ttl_s: a promise nobody came back for is forgotten after this long.
    """

    def __init__(self, capacity_tokens: int, ttl_s: float, clock: Clock) -> None:
        self._capacity_tokens = capacity_tokens
        self._ttl_s = ttl_s
        self._clock = clock
        self._promised: dict[str, tuple[int, float]] = {}
        self._num_promised_tokens = 0

    @property
    def num_promised_tokens(self) -> int:
        return self._num_promised_tokens

    def reserve(self, request_id: str, num_tokens: int, used_tokens: int) -> None:
        """Promises room beside ``used_tokens`` and what is promised already.

        Raises:
            Overloaded: there is no such room.
        """
        self._forget_old()
        free_tokens = self._capacity_tokens - used_tokens - self._num_promised_tokens
        if num_tokens > free_tokens:
            raise Overloaded(f"{num_tokens} KV tokens wanted, {max(free_tokens, 0)} free")
        self.release(request_id)
        self._promised[request_id] = (num_tokens, self._clock.now_s())
        self._num_promised_tokens += num_tokens

    def release(self, request_id: str) -> bool:
        """Ends a promise; False if there was none."""
        if request_id not in self._promised:
            return False
        num_tokens, _ = self._promised.pop(request_id)
        self._num_promised_tokens -= num_tokens
        return True

    def _forget_old(self) -> None:
        too_old_s = self._clock.now_s() - self._ttl_s
        for request_id in [key for key, (_, since_s) in self._promised.items() if since_s < too_old_s]:
            self.release(request_id)
