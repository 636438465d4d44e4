"""What is asked while something breaks, and the answers that one plain engine gives to it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fault_client import Ask, Fate, FaultClient, Said
from benchmarks.fault_settings import ENGINE_ARGS
from benchmarks.machine import describe
from benchmarks.model import CACHE, PromptMaker
from benchmarks.servers import PlainVllm, baton_config

LONG_PROMPT, MIDDLE, LONG_ANSWER, PROBE = "long prompt", "middle", "long answer", "probe"
_SIZES = {LONG_PROMPT: (1500, 12), MIDDLE: (400, 40), LONG_ANSWER: (150, 160), PROBE: (150, 8)}
"""Tokens of prompt and answer, by kind."""
NUM_REQUESTS = 20
NUM_PROBES = 30
_WHOLE_EVERY = 4
"""One request in so many is answered in one piece, the others as streams."""

ROW_KINDS: Mapping[str, Sequence[str]] = {
    "prefill": (LONG_PROMPT,),
    "first token": (MIDDLE,),
    "stream": (LONG_ANSWER,),
    "all prefill": (LONG_PROMPT, LONG_ANSWER),
}
"""Kinds of the requests that a killing row sends, by the row's key."""
LEAVER_KINDS = (LONG_PROMPT, MIDDLE, LONG_ANSWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """The same for every system; no prompt twice but the probes'."""

    by_row: Mapping[str, Sequence[Ask]]
    leavers: Mapping[str, Sequence[Ask]]
    """Streams of clients that hang up, by kind; the answers are of no interest."""
    probes: Sequence[Ask]


def make_requests(model_dir: Path, progress: Callable[[str], None]) -> Requests:
    """Makes them, and asks one plain engine for the right answers.

    Raises:
        RuntimeError: the plain engine did not answer.
    """
    prompts = PromptMaker(model_dir, seed=9)

    def body(kind: str, number: int) -> dict[str, Any]:
        prompt_tokens, output_tokens = _SIZES[kind]
        return _body(prompts, prompt_tokens, output_tokens, whole=number % _WHOLE_EVERY == 0)

    bodies = {
        row: [body(kinds[number % len(kinds)], number) for number in range(NUM_REQUESTS)]
        for row, kinds in ROW_KINDS.items()
    }
    probes = [body(PROBE, 0) for _ in range(NUM_PROBES)]
    leavers = {kind: [Ask(body(kind, 1)) for _ in range(2 * NUM_REQUESTS)] for kind in LEAVER_KINDS}
    progress("reference answers of one plain engine")
    answers = iter(_references(model_dir, [each for row in bodies.values() for each in row] + probes))
    by_row = {row: [Ask(each, next(answers)) for each in row_bodies] for row, row_bodies in bodies.items()}
    return Requests(by_row=by_row, leavers=leavers, probes=[Ask(each, next(answers)) for each in probes])


def _body(prompts: PromptMaker, prompt_tokens: int, output_tokens: int, *, whole: bool) -> dict[str, Any]:
    body = prompts.chat(prompt_tokens, max_tokens=output_tokens)
    if whole:
        body = {key: value for key, value in body.items() if not key.startswith("stream")}
    return body


def _references(model_dir: Path, bodies: Sequence[dict[str, Any]]) -> list[Said]:
    """Kept in the user's cache: the same requests to the same engine have the same answers."""
    made_of = json.dumps([bodies, ENGINE_ARGS, _engine_version(), str(model_dir)])
    path = CACHE / f"fault-references-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        said = asyncio.run(_ask_plain_engine(model_dir, bodies))
        path.write_text(json.dumps([asdict(each) for each in said]))
    return [Said(**fields) for fields in json.loads(path.read_text())]


async def _ask_plain_engine(model_dir: Path, bodies: Sequence[dict[str, Any]]) -> list[Said]:
    config = baton_config(model_dir, engine_args=ENGINE_ARGS)
    with PlainVllm(model_dir, config, ENGINE_ARGS) as plain:
        async with FaultClient(f"http://127.0.0.1:{plain.port}") as client:
            outcomes = await asyncio.gather(*(client.ask(Ask(body)) for body in bodies))
    for outcome in outcomes:
        if outcome.fate is not Fate.RIGHT:
            raise RuntimeError(f"the plain engine did not answer: {outcome.why}")
    return [outcome.said for outcome in outcomes if outcome.said is not None]


def _engine_version() -> str:
    return next(version for name, version in describe().items() if name.startswith("vllm"))
