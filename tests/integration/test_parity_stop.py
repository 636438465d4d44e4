"""Where an answer stops: stop strings and stop tokens around the seam between the two workers.

The text and the tokens to stop at are taken from plain vLLM's own answer to the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.integration import prompts
from tests.integration.parity import same_answer
from tests.integration.served import Body, Served, ServedByBaton

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

PATH = "/v1/completions"
NUM_TOKENS = 12


@dataclass(frozen=True)
class Known:
    """A prompt and its greedy answer."""

    prompt: str
    token_ids: list[int]
    texts: list[str]
    """Text of each token."""


@pytest.fixture(scope="module")
def known(plain: Served) -> Known:
    """A prompt whose answer is plain text, two characters or more a token, no token twice."""
    for seed in range(100):
        body = {"prompt": prompts.text(f"stop {seed}"), "max_tokens": NUM_TOKENS, "temperature": 0}
        choice = plain.post(PATH, {**body, "logprobs": 0, "return_token_ids": True}).body["choices"][0]
        texts = choice["logprobs"]["tokens"]
        once = len(texts) == len(set(choice["token_ids"])) == NUM_TOKENS
        if once and all(map(_clear, texts)) and "".join(texts) == choice["text"]:
            return Known(str(body["prompt"]), choice["token_ids"], texts)
    raise AssertionError("no such answer in 100 prompts")


def _clear(text: str) -> bool:
    return text.isascii() and text.isprintable() and len(text) >= 2


Stops = Callable[[Known], dict[str, Any]]
STOPS: dict[str, tuple[Stops, int]] = {
    "at the first token": (lambda k: {"stop": k.texts[0]}, 1),
    "within the first token": (lambda k: {"stop": [k.texts[0][1:]]}, 1),
    "across the seam": (lambda k: {"stop": k.texts[0][-1] + k.texts[1][0]}, 2),
    "at the first two tokens": (lambda k: {"stop": k.texts[0] + k.texts[1]}, 2),
    "at the second token": (lambda k: {"stop": k.texts[1]}, 2),
    "across four tokens": (lambda k: {"stop": k.texts[3][-1] + k.texts[4] + k.texts[5] + k.texts[6][0]}, 7),
    "at the earlier of two": (lambda k: {"stop": [k.texts[8], k.texts[4]]}, 5),
    "at the last token allowed": (lambda k: {"stop": k.texts[-1]}, NUM_TOKENS),
    "nowhere": (lambda k: {"stop": "no such text in the answer"}, NUM_TOKENS),
    "nowhere, though its beginning is there": (lambda k: {"stop": k.texts[5] + "\0"}, NUM_TOKENS),
    "not before the minimum": (lambda k: {"stop": [k.texts[0], k.texts[6]], "min_tokens": 4}, 7),
    "at the first token, an end token": (lambda k: {"stop_token_ids": [k.token_ids[0]]}, 1),
    "at the second token, an end token": (lambda k: {"stop_token_ids": [k.token_ids[1]]}, 2),
    "at the sixth token, an end token": (
        lambda k: {"stop_token_ids": k.token_ids[5:7], "ignore_eos": True},
        6,
    ),
    "at an end token before the stop string": (
        lambda k: {"stop_token_ids": [k.token_ids[3]], "stop": k.texts[7]},
        4,
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kept", [False, True], ids=["cut", "kept"])
@pytest.mark.parametrize("where", STOPS)
def test_an_answer_stops_where_plain_vllms_does(
    where: str, kept: bool, stream: bool, known: Known, cluster: ServedByBaton, plain: Served
) -> None:
    stops, num_tokens = STOPS[where]
    body: Body = {
        "prompt": known.prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "logprobs": 1,
        "return_token_ids": True,
        "include_stop_str_in_output": kept,
        "stream": stream,
        **stops(known),
    }
    if stream:
        body["stream_options"] = {"include_usage": True}

    answer, trace = same_answer(cluster, plain, PATH, body)

    assert answer["usage"]["completion_tokens"] == num_tokens
    assert trace["path"] == "remote_early"
    assert trace["outcome"] == "completed"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_stop_string_holds_on_the_path_without_an_early_token(
    stream: bool, cluster: ServedByBaton, plain: Served
) -> None:
    prompt = prompts.text(f"stop on the slow path {stream}")
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 1, "seed": 8, "stream": stream}
    whole = plain.post(PATH, {**body, "stream": False}).body["choices"][0]["text"]

    answer, trace = same_answer(cluster, plain, PATH, {**body, "stop": whole[3:6]})

    assert answer["choices"][0]["text"] == whole[:3]
    assert trace["path"] == "remote"


def test_stopping_frees_everything_at_once(cluster: ServedByBaton) -> None:
    cluster.wait_idle(within_s=12)
