"""The configuration file: one YAML document, read and checked here and nowhere else.

``load_config`` returns a frozen ``BatonConfig`` or raises one ``ConfigError`` that names every wrong
key and how to fix it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core.errors import ConfigError
from deploy.config_checks import find_problems
from deploy.config_messages import describe
from deploy.config_schema import BatonConfig
from deploy.config_yaml import read_yaml


def load_config(path: str | Path) -> BatonConfig:
    """Reads and checks a configuration file.

    Raises:
        ConfigError: the file cannot be read or is wrong; one line per wrong key.
    """
    return parse_config(read_yaml(Path(path)), source=str(path))


def parse_config(raw: Mapping[str, Any], *, source: str = "configuration") -> BatonConfig:
    """Checks a configuration given as plain mappings, lists and scalars.

    Args:
        source: what error messages call it.

    Raises:
        ConfigError: one line per wrong key.
    """
    try:
        document = json.dumps(raw)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: only plain values can stand in a configuration: {error}") from error
    try:
        config = BatonConfig.model_validate_json(document)
    except ValidationError as error:
        problems = [describe(details, BatonConfig) for details in error.errors()]
    else:
        problems = list(find_problems(config))
        if not problems:
            return config
    raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
