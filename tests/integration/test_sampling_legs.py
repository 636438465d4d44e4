"""Sampling parameters of each leg, from vLLM's own parameters."""

from __future__ import annotations

import msgspec
import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from core.request import Path
from engine.base import EngineRequest
from engine.vllm_codec import RequestDecoder, encode_sampling_params
from router.disaggregation import choose_path
from router.sampling import (
    SAFE_WITH_EARLY_TOKEN,
    after_first_token_leg,
    early_prefill_leg,
    facts_of,
    kv_only_prefill_leg,
    local_leg,
)


def decode(leg) -> SamplingParams:
    return msgspec.msgpack.decode(leg.encoded, type=SamplingParams)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"stop": ["x"], "include_stop_str_in_output": True},
        {"stop_token_ids": [3], "min_tokens": 2, "ignore_eos": True},
        {"logprobs": 3},
        {"logit_bias": {5: 1.0}, "allowed_token_ids": [5, 6]},
        {"seed": 1, "temperature": 0.0},
    ],
)
def test_what_cannot_see_the_seam_goes_early(params: dict) -> None:
    assert choose_path(facts_of(SamplingParams(max_tokens=9, **params))) is Path.REMOTE_EARLY


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"seed": 1, "temperature": 0.5},
        {"structured_outputs": StructuredOutputsParams(json="{}")},
        {"bad_words": ["no"]},
        {"thinking_token_budget": 5},
        {"extra_args": {"custom": 1}},
    ],
)
def test_what_looks_at_the_output_so_far_does_not_go_early(params: dict) -> None:
    assert choose_path(facts_of(SamplingParams(max_tokens=9, **params))) is Path.REMOTE


@pytest.mark.parametrize("params", [{"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}])
def test_what_needs_the_whole_prompt_stays_on_one_worker(params: dict) -> None:
    assert choose_path(facts_of(SamplingParams(max_tokens=9, **params))) is Path.LOCAL


def test_every_field_listed_as_safe_exists() -> None:
    assert set(SamplingParams.__struct_fields__) >= SAFE_WITH_EARLY_TOKEN


def test_the_decode_leg_counts_without_the_token_that_was_sent() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=4, stop=["x"])
    rest = decode(after_first_token_leg(params))
    assert (rest.max_tokens, rest.min_tokens, rest.stop) == (8, 3, [])
    whole = decode(local_leg(params))
    assert (whole.max_tokens, whole.min_tokens, whole.stop) == (9, 4, [])
    assert (params.max_tokens, params.min_tokens, params.stop) == (9, 4, ["x"])


def test_the_early_token_obeys_min_tokens() -> None:
    first = decode(early_prefill_leg(SamplingParams(max_tokens=9, min_tokens=4)))
    assert (first.max_tokens, first.min_tokens) == (1, 1)


def test_a_thrown_away_token_cannot_end_the_request() -> None:
    leg = decode(kv_only_prefill_leg())
    assert leg.ignore_eos
    assert leg.max_tokens == 1


def test_parameters_survive_the_wire_whole() -> None:
    params = SamplingParams(
        max_tokens=9,
        logit_bias={5: 1.5},
        stop_token_ids=[7],
        structured_outputs=StructuredOutputsParams(json="{}"),
    )
    params.update_from_generation_config({"eos_token_id": [2, 3]}, 2)
    request = EngineRequest(
        request_id="r", prompt_token_ids=[1], max_tokens=4, sampling_params=encode_sampling_params(params)
    )
    got, _ = RequestDecoder().decode(request)
    assert got.max_tokens == 4
    assert got.logit_bias == {5: 1.5}
    assert got.structured_outputs.json == "{}"
    assert got.all_stop_token_ids == params.all_stop_token_ids
    assert got.eos_token_id == params.eos_token_id


def test_parameters_that_do_not_decode_are_the_requests_fault() -> None:
    request = EngineRequest(request_id="r", prompt_token_ids=[1], max_tokens=4, sampling_params=b"\xc1")
    with pytest.raises(ValueError, match="do not decode"):
        RequestDecoder().decode(request)


def test_a_pull_request_carries_the_kv_parameters_and_nothing_of_the_clients() -> None:
    params = SamplingParams(max_tokens=9, extra_args={"kv_transfer_params": {"evil": 1}, "mine": 2})
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=[1],
        max_tokens=4,
        sampling_params=encode_sampling_params(params),
        kv_params={"good": 1},
    )
    got, _ = RequestDecoder().decode(request)
    assert got.extra_args == {"kv_transfer_params": {"good": 1}, "mine": 2}
