"""Loads in one line of text, for the command line.

Grammar::

    load     = kind ":" settings              settings = name "=" value {"," name "=" value}
    poisson:   rate, prompt, output, duration
    bursts:    rate, cv, prompt, output, duration
    sinusoid:  low, high, period, prompt, output, duration
    phases:    phase {"/" phase}              phase = rate, prompt, output, duration
               A phase keeps what it does not set from the one before it; repeat=N, once, repeats all.
    sessions:  rate, turns, think, user, output, duration
               [, system=0, tpot=0.02, context=131072, block=64]

    prompt, output, user   tokens: 3000 (fixed), 100..900 (uniform), 3000~12000 (lognormal: mean~p99)
    rate, low, high        requests a second; of sessions, new sessions a second
    duration, period, think, tpot   time: 90, 90s, 15m, 2h, 20ms

Examples::

    poisson:rate=5,prompt=3000,output=300,duration=600
    sinusoid:low=2,high=12,period=1h,prompt=1200~8000,output=50..400,duration=2h
    phases:rate=2,prompt=8000,output=100,duration=10m/rate=6,prompt=500,output=400
    sessions:rate=0.5,turns=6,think=20s,user=150,output=250,system=1000,duration=1h
"""

from __future__ import annotations

import re

from core.errors import ConfigError
from simulator.traces.draws import (
    Bursts,
    FixedLengths,
    Lengths,
    LognormalLengths,
    Poisson,
    Sinusoid,
    UniformLengths,
)
from simulator.traces.generators import Independent, Phase, Phases, WorkloadSpec
from simulator.traces.sessions import Sessions

_NEEDED = {
    "poisson": ("rate", "prompt", "output", "duration"),
    "bursts": ("rate", "cv", "prompt", "output", "duration"),
    "sinusoid": ("low", "high", "period", "prompt", "output", "duration"),
    "phases": ("rate", "prompt", "output", "duration"),
    "sessions": ("rate", "turns", "think", "user", "output", "duration"),
}
_OPTIONAL = {"sessions": ("system", "tpot", "context", "block"), "phases": ("repeat",)}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "h": 3600.0}
_WHOLE = r"[0-9]{1,12}"
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)"

Settings = dict[str, str]


def is_workload(text: str) -> bool:
    """Whether the text means a load, and not a file."""
    return text.partition(":")[0] in _NEEDED and ":" in text


def workload_from_text(text: str) -> WorkloadSpec:
    """Reads a load; the module's docstring has the grammar.

    Raises:
        core.errors.ConfigError: the text does not follow the grammar, or a value makes no sense.
    """
    kind, colon, body = text.strip().partition(":")
    if kind not in _NEEDED or not colon:
        raise ConfigError(
            f"{text!r} is no load; it begins with one of {', '.join(f'{known}:' for known in _NEEDED)}"
        )
    try:
        return _phases(body) if kind == "phases" else _single(kind, _settings(kind, body))
    except ConfigError as error:
        raise ConfigError(f"load {text!r}: {error}") from error


def _single(kind: str, given: Settings) -> WorkloadSpec:
    _check_complete(kind, given)
    duration_s, output = _seconds(given, "duration"), _lengths(given, "output")
    if kind == "sessions":
        return Sessions(
            rate_rps=_number(given, "rate"),
            duration_s=duration_s,
            turns=_number(given, "turns"),
            think_s=_seconds(given, "think"),
            user=_lengths(given, "user"),
            output=output,
            system_tokens=_whole(given, "system", "0"),
            assumed_tpot_s=_seconds(given, "tpot", "0.02"),
            max_context_tokens=_whole(given, "context", "131072"),
            hash_block_tokens=_whole(given, "block", "64"),
        )
    arrivals: Poisson | Bursts | Sinusoid
    if kind == "poisson":
        arrivals = Poisson(rate_rps=_number(given, "rate"))
    elif kind == "bursts":
        arrivals = Bursts(rate_rps=_number(given, "rate"), cv=_number(given, "cv"))
    else:
        arrivals = Sinusoid(
            low_rps=_number(given, "low"),
            high_rps=_number(given, "high"),
            period_s=_seconds(given, "period"),
        )
    return Independent(
        arrivals=arrivals, duration_s=duration_s, prompt=_lengths(given, "prompt"), output=output
    )


def _phases(body: str) -> Phases:
    phases = []
    given: Settings = {}
    repeat: int | None = None
    for part in body.split("/"):
        new = _settings("phases", part)
        if "repeat" in new:
            if repeat is not None:
                raise ConfigError("repeat is given twice; it repeats the whole row of phases")
            repeat = _whole(new, "repeat")
            del new["repeat"]
        given |= new
        _check_complete("phases", given)
        phases.append(
            Phase(
                duration_s=_seconds(given, "duration"),
                rate_rps=_number(given, "rate"),
                prompt=_lengths(given, "prompt"),
                output=_lengths(given, "output"),
            )
        )
    return Phases(phases=tuple(phases), repeat=1 if repeat is None else repeat)


def _settings(kind: str, body: str) -> Settings:
    known = _NEEDED[kind] + _OPTIONAL.get(kind, ())
    given: Settings = {}
    for item in body.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ConfigError(
                f"{item.strip()!r} is no setting; write name=value, with commas between settings"
            )
        if name not in known:
            raise ConfigError(f"{kind} has no setting {name!r}; its settings are {', '.join(known)}")
        if name in given:
            raise ConfigError(f"{name} is given twice")
        given[name] = value
    return given


def _check_complete(kind: str, given: Settings) -> None:
    missing = [name for name in _NEEDED[kind] if name not in given]
    if missing:
        raise ConfigError(f"{kind} also needs {', '.join(missing)}")


def _lengths(given: Settings, name: str) -> Lengths:
    text = given[name]
    if match := re.fullmatch(rf"({_WHOLE})\.\.({_WHOLE})", text):
        return UniformLengths(low=int(match[1]), high=int(match[2]))
    if match := re.fullmatch(rf"({_NUMBER})~({_NUMBER})", text):
        return LognormalLengths(mean=float(match[1]), p99=float(match[2]))
    if re.fullmatch(_WHOLE, text):
        return FixedLengths(tokens=int(text))
    raise ConfigError(
        f"{name} is {text!r}; write tokens: 3000 (fixed), 100..900 (uniform) or 3000~12000 (mean~p99)"
    )


def _number(given: Settings, name: str) -> float:
    if not re.fullmatch(_NUMBER, given[name]):
        raise ConfigError(f"{name} is {given[name]!r}; write a number")
    return float(given[name])


def _whole(given: Settings, name: str, default: str = "") -> int:
    text = given.get(name, default)
    if not re.fullmatch(_WHOLE, text):
        raise ConfigError(f"{name} is {text!r}; write a whole number")
    return int(text)


def _seconds(given: Settings, name: str, default: str = "") -> float:
    text = given.get(name, default)
    match = re.fullmatch(rf"({_NUMBER})(ms|s|m|h|)", text)
    if not match:
        raise ConfigError(f"{name} is {text!r}; write a time such as 90, 90s, 15m or 2h")
    return float(match[1]) * _SECONDS[match[2]]
