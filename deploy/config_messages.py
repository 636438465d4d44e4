"""Turns pydantic's validation errors into one line each: key path, what is wrong, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "string_too_long": "at most {max_length} characters long",
    "enum": "{expected}",
}


def describe(error: ErrorDetails, root: type[BaseModel]) -> str:
    """One line for one of pydantic's errors.

    Args:
        root: the model that was validated; it knows the right keys and what they mean.
    """
    path = key_path(error["loc"])
    given = _quote(error["input"])
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = list(_section_at(error["loc"][:-1], root).model_fields)
            return f"{path}: unknown key{suggestion(str(error['loc'][-1]), known)}"
        case "missing":
            field = _section_at(error["loc"][:-1], root).model_fields[str(error["loc"][-1])]
            return f"{path}: is missing; add it: {_first_sentence(field.description or '')}"
        case "model_type" | "model_attributes_type":
            keys = ", ".join(_section_at(error["loc"], root).model_fields)
            return f"{path}: must be a section with the keys {keys}, not {given}"
        case "literal_error":
            allowed = context["expected"]
            must_be = f"must be {allowed}" if " or " in allowed else f"only {allowed} is supported"
            return f"{path}: {must_be}, not {given}"
        case "string_type":
            quotes = "; put it in quotes" if isinstance(error["input"], int | float) else ""
            return f"{path}: must be text, not {given}{quotes}"
        case "string_too_short":
            return f"{path}: must not be empty"
        case "string_pattern_mismatch":
            return f"{path}: must be lower-case letters, digits and inner hyphens, not {given}"
        case kind if kind in _EXPECTED:
            return f"{path}: must be {_EXPECTED[kind].format(**context)}, not {given}"
        case _:
            return f"{path}: {error['msg']}, not {given}"


def key_path(location: Sequence[int | str]) -> str:
    """``("models", 0, "name")`` as ``models[0].name``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them."""
    known = list(known)
    nearest = difflib.get_close_matches(wrong.replace("-", "_"), known, n=1)
    if nearest:
        return f"; did you mean {nearest[0]}?"
    return f"; known: {', '.join(known)}" if len(known) <= 20 else ""


def _section_at(location: Sequence[int | str], root: type[BaseModel]) -> type[BaseModel]:
    section = root
    for part in location:
        if isinstance(part, str):
            section = section_in(section.model_fields[part].annotation) or section
    return section


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as ``tuple[ShapeConfig, ...]``, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := section_in(arg))), None)


def _quote(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_sentence(description: str) -> str:
    return description.split(". ")[0].rstrip(".").replace("\n", " ")
