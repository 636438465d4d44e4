"""Reads the configuration file: YAML 1.2 core types, environment variables, no duplicate keys.

PyYAML speaks YAML 1.1, where ``off`` is false and ``1:30`` is 90, and it takes the last of two equal
keys in silence. ``_Loader`` knows true, false, null, numbers and text, and refuses the second key.
"""
# mypy: disallow-untyped-calls=False
# (PyYAML's stubs leave its parser untyped.)

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_REFERENCE = re.compile(r"(?P<escape>\$)?\$\{(?P<body>[^}]*)\}")
_REFERENCE_BODY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(:-(?P<default>.*))?", re.DOTALL)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own)

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        is_plain = self.peek_event().implicit[0]
        node = super().compose_scalar_node(anchor)
        if "${" in node.value:
            node.value = _substitute(node.value, _where(node))
            if is_plain:
                node.tag = self.resolve(yaml.ScalarNode, node.value, (True, False))
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise ConfigError(f"{_where(key_node)}: {key_node.value!r} is given twice; keep one")
                seen.add(key_node.value)
        return node


for _name, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", "~nN"),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", "-+0123456789"),
    ("float", r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)", "-+.0123456789"),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))", "-+."),
    ("merge", r"<<", "<"),
):
    first = [*_first, ""] if _name == "null" else list(_first)
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^{_pattern}$"), first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


_Loader.add_constructor(_TAG + "int", _construct_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file whose document is a mapping.

    ``${NAME}`` stands for an environment variable, ``${NAME:-default}`` gives a default for one that
    is not set or empty, ``$${`` is a literal ``${``. An unquoted value is typed after substitution.

    Raises:
        ConfigError: missing file, broken YAML, empty document, unset variable, duplicate key.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        document = yaml.load(content, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{path}: {line}not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if document is None:
        raise ConfigError(f"{path}: the file is empty; start from a file in deploy/configs")
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a mapping with the key 'models', not a {type(document).__name__}")
    return document


def _substitute(text: str, where: str) -> str:
    def value_of(reference: re.Match[str]) -> str:
        if reference["escape"]:
            return reference[0][1:]
        body = _REFERENCE_BODY.fullmatch(reference["body"])
        if body is None:
            raise ConfigError(f"{where}: {reference[0]} must be ${{NAME}} or ${{NAME:-default}}")
        value = os.environ.get(body["name"], "")
        if value or body["default"] is not None:
            return value or body["default"]
        if body["name"] in os.environ:
            return ""
        raise ConfigError(
            f"{where}: the environment variable {body['name']} is not set; "
            f"set it or write ${{{body['name']}:-default}}"
        )

    return _REFERENCE.sub(value_of, text)


def _where(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
