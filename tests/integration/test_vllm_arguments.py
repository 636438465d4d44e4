"""What the configuration says about vLLM's arguments is true of the installed vLLM."""

from __future__ import annotations

import dataclasses

import pytest

from deploy.config_engine_args import VLLM_ARGS_SET_BY_BATON, vllm_engine_arg_names

pytestmark = pytest.mark.engine


def test_the_engine_arguments_read_from_the_source_are_those_of_the_class() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert vllm_engine_arg_names() == {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def test_every_refused_front_end_argument_exists() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = set(make_arg_parser(FlexibleArgumentParser())._option_string_actions)
    assert VLLM_ARGS_SET_BY_BATON.keys() - options == set()
