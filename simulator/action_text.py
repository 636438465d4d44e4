"""Actions in one line of text, for the command line.

Grammar::

    action = time " " kind " " what
    SECONDS switch WORKER prefill|decode      another role
    SECONDS add SHAPE prefill|decode          one more worker, ready after its start-up time
    SECONDS remove WORKER                     drains and goes
    SECONDS kill WORKER
    SECONDS stall WORKER SECONDS              computes nothing for a while
    SECONDS fail-pulls WORKER SECONDS         its KV pulls fail for a while
    SECONDS slow-link WORKER SECONDS FACTOR   its KV transfers take FACTOR times as long for a while

Workers are named SHAPE-NUMBER; numbers start at 0, with the workers that begin as prefill workers.

Example: ``120 switch h200-0 decode``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.errors import ConfigError
from core.types import Role
from simulator.actions import (
    Action,
    AddWorker,
    FailPulls,
    Kill,
    RemoveWorker,
    SlowLink,
    Stall,
    SwitchRole,
)

_KINDS: dict[str, tuple[int, Callable[[float, Sequence[str]], Action]]] = {
    "switch": (2, lambda at, what: SwitchRole(time_s=at, worker_id=what[0], role=Role(what[1]))),
    "add": (2, lambda at, what: AddWorker(time_s=at, shape=what[0], role=Role(what[1]))),
    "remove": (1, lambda at, what: RemoveWorker(time_s=at, worker_id=what[0])),
    "kill": (1, lambda at, what: Kill(time_s=at, worker_id=what[0])),
    "stall": (2, lambda at, what: Stall(time_s=at, worker_id=what[0], duration_s=_positive(what[1]))),
    "fail-pulls": (
        2,
        lambda at, what: FailPulls(time_s=at, worker_id=what[0], duration_s=_positive(what[1])),
    ),
    "slow-link": (
        3,
        lambda at, what: SlowLink(
            time_s=at, worker_id=what[0], duration_s=_positive(what[1]), factor=_positive(what[2])
        ),
    ),
}
_HELP = f"give SECONDS, one of {', '.join(_KINDS)}, and what it is done to, as in '120 kill h200-0'"


def action_from_text(text: str) -> Action:
    """
    Raises:
        ConfigError: the text does not follow the grammar.
    """
    words = text.split()
    try:
        time_s = float(words[0])
        num_words, make = _KINDS[words[1]]
        if len(words) != 2 + num_words or not 0 <= time_s < float("inf"):
            raise ValueError
        return make(time_s, words[2:])
    except (IndexError, KeyError, ValueError):
        raise ConfigError(f"{text!r} is no action: {_HELP}") from None


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value
