"""Requests with the answers that plain vLLM gives, against which every answer under a fault is held."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.config import load_config
from tests.faults.configuration import MODEL, configuration
from tests.integration import prompts
from tests.integration.parity import complete
from tests.integration.plain_vllm import start_plain_vllm
from tests.integration.served import Body, Served
from tests.integration.server_process import HOST, answers, free_port

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG_PROMPT, LONG_ANSWER, MIXED, SAMPLED, WHOLE = "long prompt", "long answer", "mixed", "sampled", "whole"
"""Kinds of requests: slow to prefill; slow to decode; something of all; seeds and penalties; not streamed."""
ANY = (LONG_PROMPT, LONG_ANSWER, MIXED, SAMPLED, WHOLE)
GREEDY = (LONG_PROMPT, LONG_ANSWER, MIXED, WHOLE)
_START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Case:
    """One request and its right answer."""

    kind: str
    path: str
    body: Body
    expected: Any
    """The whole answer, as :func:`tests.integration.parity.complete` puts it together."""

    @property
    def text(self) -> str:
        return text_of(self.expected)


class References:
    """Cases by kind."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = tuple(cases)

    def endless(self, kinds: Sequence[str], seed: object) -> Iterator[Case]:
        """Cases of these kinds in random order, for ever."""
        chosen = [case for case in self.cases if case.kind in kinds]
        source = random.Random(f"cases {seed}")
        return (source.choice(chosen) for _ in itertools.count())


def text_of(answer: Any) -> str:
    """The first choice's text, of a complete answer of either endpoint."""
    (choice, *_) = answer["choices"] or ({},)
    if "text" in choice:
        return choice["text"] or ""
    message = choice.get("message") or choice.get("delta") or {}
    return message.get("content") or ""


def make_references(model_path: Path, run_dir: Path, *, num_of_each: int = 8) -> References:
    """Asks plain vLLM, in a process of its own that ends with this call."""
    config_path = run_dir / f"plain-{model_path.name}.yaml"
    config_path.write_text(json.dumps(configuration(model_path, paced=False)))
    config = load_config(config_path)
    port = free_port()
    plain = start_plain_vllm(config, port, run_dir / f"plain-{model_path.name}.log")
    try:
        served = Served(f"http://{HOST}:{port}", MODEL)
        plain.wait_until(lambda: answers(f"{served.url}/health"), _START_TIMEOUT_S)
        cases = list(_requests(num_of_each))
        found: list[Case] = []
        for path in (COMPLETIONS, CHAT):
            here = [(kind, body) for kind, where, body in cases if where == path]
            got = asyncio.run(served.post_all(path, [body for _, body in here], at_once=16))
            for (kind, body), answer in zip(here, got, strict=True):
                assert answer.status == 200, answer.body
                found.append(Case(kind, path, body, complete(answer)))
        served.close()
        return References(found)
    finally:
        plain.stop(grace_s=15)


def _requests(num_of_each: int) -> Iterator[tuple[str, str, Body]]:
    """Kind, path and body; prompts differ in length around the 128 tokens of a KV block."""
    streamed: Body = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    greedy = streamed | {"temperature": 0}
    for number in range(num_of_each):
        long = prompts.tokens(1100 + 97 * (number % 5), f"long {number}")
        yield LONG_PROMPT, COMPLETIONS, greedy | {"prompt": long, "max_tokens": 8}

        short = prompts.tokens((90, 127, 128, 129, 200, 256, 300, 385)[number % 8], f"short {number}")
        yield LONG_ANSWER, COMPLETIONS, greedy | {"prompt": short, "max_tokens": 150}

        some = {"max_tokens": 20 + 3 * number}
        if number % 2:
            messages = prompts.chat(f"chat {number}", num_words=60 * (number + 1))
            yield MIXED, CHAT, greedy | some | {"messages": messages}
        else:
            middle = prompts.tokens(250 + 70 * number, f"middle {number}")
            yield MIXED, COMPLETIONS, greedy | some | {"prompt": middle}

        odd: Body = ({"presence_penalty": 1.0}, {"frequency_penalty": 1.2}, {"seed": 7})[number % 3]
        temperature = {"temperature": 0.8 if "seed" in odd else 0}
        prompt = prompts.tokens(150 + 60 * number, f"odd {number}")
        yield SAMPLED, COMPLETIONS, streamed | temperature | odd | {"prompt": prompt, "max_tokens": 40}

        prompt = prompts.tokens(140 + 50 * number, f"whole {number}")
        whole: Body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        yield WHOLE, COMPLETIONS, whole
