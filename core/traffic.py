"""What a router tells of the requests it has seen: counts since its start, by length."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import field

from core.record import record

PROMPT_CLASS_LIMITS = tuple(round(64 * 2 ** (half_octave / 2)) for half_octave in range(25))
"""Most prompt tokens of each class, half an octave wide: 64, 91, ..., 262144. Longer ones are one more."""
NUM_PROMPT_CLASSES = len(PROMPT_CLASS_LIMITS) + 1


def prompt_class(prompt_tokens: int) -> int:
    """The class of a prompt, 0 to ``NUM_PROMPT_CLASSES - 1``."""
    return bisect_left(PROMPT_CLASS_LIMITS, prompt_tokens)


ANSWER_CLASS_LIMITS = tuple(round(4 * 2 ** (half_octave / 2)) for half_octave in range(27))
"""Most tokens of each class of answers: 4, 6, 8, ..., 32768. Longer ones are one more."""
NUM_ANSWER_CLASSES = len(ANSWER_CLASS_LIMITS) + 1


def answer_class(num_tokens: int) -> int:
    """The class of an answer of at least one token, 0 to ``NUM_ANSWER_CLASSES - 1``."""
    return bisect_left(ANSWER_CLASS_LIMITS, num_tokens)


def _of_prompts() -> tuple[int, ...]:
    return (0,) * NUM_PROMPT_CLASSES


def _of_answers() -> tuple[int, ...]:
    return (0,) * NUM_ANSWER_CLASSES


@record
class TrafficSummary:
    """One router's traffic. Counts only grow, so that a lost summary loses nothing.

    Tuples hold one count for each class of length. How long answers will be is learned from those that go
    on, too: of the answers that reached a class, so many ended in it.
    """

    router_id: str
    """New for every start of a router: counts begin at 0."""
    num_arrived: tuple[int, ...] = field(default_factory=_of_prompts)
    """Requests that came, refused ones among them."""
    prompt_tokens: tuple[int, ...] = field(default_factory=_of_prompts)
    """...and all their prompt tokens."""
    placed_tokens: tuple[int, ...] = field(default_factory=_of_prompts)
    """Prompt tokens of the requests that were sent to a worker..."""
    cached_tokens: tuple[int, ...] = field(default_factory=_of_prompts)
    """...and how many of those the worker was expected to have cached."""
    num_reached: tuple[int, ...] = field(default_factory=_of_answers)
    """Answers that have grown into each class, those that went beyond it among them."""
    num_ended: tuple[int, ...] = field(default_factory=_of_answers)
    """Answers whose last token was in it..."""
    ended_tokens: tuple[int, ...] = field(default_factory=_of_answers)
    """...and all their tokens."""
    output_tokens: int = 0
    """Tokens that clients have got, those of answers that go on among them."""
    kv_tokens: int = 0
    """For each of those, the tokens in front of it, prompt and answer: what its step had to read."""
    num_met: int = 0
    """Requests that ended within both targets."""
    num_missed_ttft: int = 0
    num_missed_tpot: int = 0
    num_refused: int = 0
    """Turned away by admission control."""
    num_failed: int = 0
    num_waiting: int = 0
    """Now in the router's line, sent to nobody yet..."""
    waiting_prompt_tokens: int = 0
    """...and their prompt tokens."""
    num_ongoing: int = 0
    """Now in flight, waiting ones among them."""
    suspects: dict[str, int] = field(default_factory=dict)
    """How often this router has stopped sending to a worker that failed its requests, by incarnation."""
