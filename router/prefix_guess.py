"""Which workers probably hold which prompt blocks: guessed from what was sent, and that with what is known.

Theory of operation. A worker that was sent a prompt holds its blocks soon after, for a while. Guesses age by
generations: what a worker is sent goes into its youngest one, a new one begins when that has a quarter of
the time to live or of the worker's KV capacity, and the oldest goes as a whole. A prompt that comes again is
written to the youngest generation from its first block on, so the blocks used last go last, and what a
worker is guessed to hold of a prompt lies whole in some one generation. Each generation is a worker of one
``PrefixIndex``: a match costs one lookup, and forgetting a generation touches no block.

``PrefixKnowledge`` takes each worker's events where they flow and guesses where they do not. Between the
sending of a prompt and the events it leads to, a second, short-lived guess stands in for them, so that equal
prompts in one burst see each other. All three say at least what a worker holds, so the largest counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from router.block_rows import States
from router.prefix_index import PrefixIndex

_NUM_GENERATIONS = 4


@dataclass(slots=True, kw_only=True)
class _Guessed:
    capacity_blocks: int
    generations: deque[int] = field(default_factory=deque)
    """Numbers of those that hold something, oldest first."""
    youngest_since_s: float = 0.0


class GuessedPrefixes:
    """What the router's own decisions let one expect in each worker's cache.

    A guess ends between 3/4 of ``ttl_s`` and ``ttl_s`` after the prompt was last sent, or when newer prompts
    of the same worker need its room: at most ``capacity_blocks`` count, those used longest ago go first, by
    quarters of the capacity. Blocks sent again count once for each generation they are in.

    Args:
        ttl_s: seconds after which a guess does not count.
        max_blocks: bounds memory, see ``PrefixIndex``.
    """

    def __init__(self, *, ttl_s: float, max_blocks: int = 20_000_000) -> None:
        if ttl_s <= 0:
            raise ValueError(f"ttl_s must be above 0, not {ttl_s}")
        self._ttl_s = ttl_s
        self._index: PrefixIndex[int] = PrefixIndex(max_blocks)
        self._guessed: dict[str, _Guessed] = {}
        self._next_generation = 0
        self._by_age: dict[int, tuple[float, str]] = {}
        """When each generation began, and whose it is; oldest first."""

    def set_worker(self, worker_id: str, capacity_blocks: int) -> None:
        """Adds a worker, or changes the capacity of one that is known; a smaller one counts from now on.

        Args:
            capacity_blocks: blocks that fit its KV cache.

        Raises:
            ValueError: the capacity is below 1.
        """
        if capacity_blocks < 1:
            raise ValueError(f"capacity_blocks of {worker_id!r} must be at least 1, not {capacity_blocks}")
        guessed = self._guessed.setdefault(worker_id, _Guessed(capacity_blocks=capacity_blocks))
        guessed.capacity_blocks = capacity_blocks
        self._shrink(guessed)

    def remove_worker(self, worker_id: str) -> None:
        """Forgets a worker; one that is not known is no error."""
        self.clear(worker_id)
        self._guessed.pop(worker_id, None)

    def clear(self, worker_id: str) -> None:
        """Forgets what a worker was sent."""
        guessed = self._guessed.get(worker_id)
        while guessed and guessed.generations:
            self._drop_oldest(guessed)

    def num_blocks(self, worker_id: str) -> int:
        """Blocks the worker is guessed to hold, before ageing; at most its capacity."""
        return self._num_blocks(self._guessed[worker_id]) if worker_id in self._guessed else 0

    def sent(self, worker_id: str, states: States, now_s: float) -> None:
        """A request goes to this worker, which will hold these blocks.

        Args:
            states: of ``chain_states``, from the prompt's first block on; what exceeds the worker's capacity
                is left out.
            now_s: time, never smaller than before.

        Raises:
            ValueError: the worker is not known.
        """
        guessed = self._guessed.get(worker_id)
        if guessed is None:
            raise ValueError(f"worker {worker_id!r} is not known: call set_worker first")
        states = states[: guessed.capacity_blocks]
        if not len(states):
            return
        self._forget_old(now_s)
        if self._is_full(guessed, now_s):
            self._begin(worker_id, guessed, now_s)
        self._index.store(guessed.generations[-1], states)
        self._shrink(guessed)
        if not guessed.generations:
            self._begin(worker_id, guessed, now_s)
            self._index.store(guessed.generations[-1], states)

    def match(self, states: States, now_s: float) -> dict[str, int]:
        """How many blocks at the beginning of a prompt each worker is guessed to hold.

        Returns:
            By worker, only those that hold the first block.
        """
        self._forget_old(now_s)
        matched: dict[str, int] = {}
        for generation, num_blocks in self._index.match(states).items():
            worker_id = self._by_age[generation][1]
            matched[worker_id] = max(num_blocks, matched.get(worker_id, 0))
        return matched

    def _is_full(self, guessed: _Guessed, now_s: float) -> bool:
        """Whether it is time for another generation."""
        if not guessed.generations:
            return True
        num_blocks = self._index.num_blocks(guessed.generations[-1])
        age_s = now_s - guessed.youngest_since_s
        return (
            num_blocks * _NUM_GENERATIONS >= guessed.capacity_blocks
            or age_s * _NUM_GENERATIONS >= self._ttl_s
        )

    def _num_blocks(self, guessed: _Guessed) -> int:
        return sum(map(self._index.num_blocks, guessed.generations))

    def _begin(self, worker_id: str, guessed: _Guessed, now_s: float) -> None:
        generation = self._next_generation
        self._next_generation += 1
        self._index.set_worker(generation)
        self._by_age[generation] = (now_s, worker_id)
        guessed.generations.append(generation)
        guessed.youngest_since_s = now_s

    def _shrink(self, guessed: _Guessed) -> None:
        while self._num_blocks(guessed) > guessed.capacity_blocks:
            self._drop_oldest(guessed)

    def _forget_old(self, now_s: float) -> None:
        while self._by_age:
            began_s, worker_id = next(iter(self._by_age.values()))
            if now_s - began_s <= self._ttl_s:
                break
            self._drop_oldest(self._guessed[worker_id])

    def _drop_oldest(self, guessed: _Guessed) -> None:
        generation = guessed.generations.popleft()
        self._index.remove_worker(generation)
        del self._by_age[generation]


class PrefixKnowledge:
    """What is known or guessed of every worker's cached prefixes, for the routing decision.

    A worker is guessed at until ``replace`` says what it holds; from then on its events count. Where events
    are interrupted, what was known stands until they go on. A precise worker whose blocks exceed
    ``max_blocks`` is guessed at as well, for the blocks left out.

    Args:
        ttl_s: how long a guess counts.
        in_flight_s: how long what was sent to a precise worker stands in for the events it leads to:
            a little more than a prompt waits and takes.
        max_blocks: bounds memory, see ``PrefixIndex``.
    """

    def __init__(
        self, *, ttl_s: float = 600.0, in_flight_s: float = 10.0, max_blocks: int = 20_000_000
    ) -> None:
        self._known: PrefixIndex[str] = PrefixIndex(max_blocks)
        self._guesses = GuessedPrefixes(ttl_s=ttl_s, max_blocks=max_blocks)
        self._in_flight = GuessedPrefixes(ttl_s=in_flight_s, max_blocks=max_blocks)
        self._precise: set[str] = set()

    @property
    def num_known_blocks(self) -> int:
        """Different blocks known from events."""
        return len(self._known)

    def set_worker(self, worker_id: str, capacity_blocks: int) -> None:
        """Adds a worker, or changes the KV capacity of one that is known.

        Raises:
            ValueError: the capacity is below 1.
        """
        self._guesses.set_worker(worker_id, capacity_blocks)
        self._in_flight.set_worker(worker_id, capacity_blocks)
        self._known.set_worker(worker_id)

    def remove_worker(self, worker_id: str) -> None:
        """Forgets a worker; one that is not known is no error."""
        for part in (self._known, self._guesses, self._in_flight):
            part.remove_worker(worker_id)
        self._precise.discard(worker_id)

    def is_precise(self, worker_id: str) -> bool:
        """Whether the worker's events flow."""
        return worker_id in self._precise

    def replace(self, worker_id: str, states: States) -> None:
        """Events begin, or begin again after a gap: the worker holds just these blocks now.

        Raises:
            ValueError: the worker is not known.
        """
        self._known.replace(worker_id, states)
        self._guesses.clear(worker_id)
        self._precise.add(worker_id)

    def store(self, worker_id: str, states: States) -> None:
        """An event: the worker holds these blocks. Ignored unless its events flow; so is ``evict``."""
        if worker_id in self._precise:
            self._known.store(worker_id, states)

    def evict(self, worker_id: str, states: States) -> None:
        """An event: the worker holds these blocks no longer."""
        if worker_id in self._precise:
            self._known.evict(worker_id, states)

    def sent(self, worker_id: str, states: States, now_s: float) -> None:
        """A request goes to this worker, which will hold these blocks.

        Raises:
            ValueError: the worker is not known.
        """
        known_soon = worker_id in self._precise and self._known.is_complete(worker_id)
        (self._in_flight if known_soon else self._guesses).sent(worker_id, states, now_s)

    def match(self, states: States, now_s: float) -> dict[str, int]:
        """How many blocks at the beginning of a prompt each worker holds, as far as one can tell.

        Args:
            states: of ``chain_states``, the whole prompt, shape (num_blocks,).
            now_s: time, never smaller than before.

        Returns:
            By worker, only those that hold the first block.
        """
        matched = self._known.match(states)
        for guesses in (self._guesses, self._in_flight):
            for worker_id, num_blocks in guesses.match(states, now_s).items():
                if num_blocks > matched.get(worker_id, 0):
                    matched[worker_id] = num_blocks
        return matched
