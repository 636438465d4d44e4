"""vLLM's engine arguments from the plain values that a configuration file can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def engine_arguments(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Makes mappings what AsyncEngineArgs declares them to be, as vLLM's own command line does.

    Raises:
        ValueError: a mapping does not fit its configuration class.
    """
    from pydantic import TypeAdapter, ValidationError
    from vllm.engine.arg_utils import AsyncEngineArgs

    types = {field.name: field.type for field in dataclasses.fields(AsyncEngineArgs)}
    arguments = dict(plain)
    for name, value in plain.items():
        declared = types.get(name)
        if not isinstance(value, Mapping) or declared is None or isinstance(declared, str):
            continue
        try:
            arguments[name] = TypeAdapter(declared).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"engine_args.{name}: {error}") from error
    return arguments
