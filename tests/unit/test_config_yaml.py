"""How the configuration file is read: YAML 1.2 types, variables, broken files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from deploy.config import load_config
from deploy.config_yaml import read_yaml

BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "the file is empty; start from a file in deploy/configs"),
    "a file of comments": (b"# nothing\n", "the file is empty; start from a file in deploy/configs"),
    "a list": (b"- models\n", "must be a mapping with the key 'models', not a list"),
    "a word": (b"models", "must be a mapping with the key 'models', not a str"),
    "broken YAML": (b"a: [1\nb: 2", "line 2: not valid YAML: expected ',' or ']', but got ':'"),
    "a tab": (b"a:\n\tb: 1", "line 2: not valid YAML: found character '\\t' that cannot start any token"),
    "two documents": (b"a: 1\n---\nb: 1\n", "line 2: not valid YAML: but found another document"),
    "an unknown tag": (
        b"a: !!python/name:os.system x",
        "line 1: not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/name:os.system'",
    ),
    "a key given twice": (b"a: 1\nb: 2\na: 3\n", "line 3: 'a' is given twice; keep one"),
    "a document that contains itself": (
        b"models: &m [*m]",
        "only plain values can stand in a configuration: Circular reference detected",
    ),
    "an unset variable": (
        b"a: 1\nmodels: ${BATON_TEST_UNSET}",
        "line 2: the environment variable BATON_TEST_UNSET is not set; "
        "set it or write ${BATON_TEST_UNSET:-default}",
    ),
    "a bad reference": (b"a: ${A B}", "line 1: ${A B} must be ${NAME} or ${NAME:-default}"),
}


@pytest.mark.parametrize(("content", "problem"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_file(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: {problem}"


def test_a_file_that_is_not_text_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: not valid YAML: [^\n]+$"):
        load_config(path)


def test_a_missing_file_and_a_directory_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file$"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r": cannot be read: Is a directory$"):
        load_config(tmp_path)


def read(text: str, tmp_path: Path) -> Any:
    path = tmp_path / "values.yaml"
    path.write_text(text)
    return read_yaml(path)


def test_words_that_older_yaml_reads_as_something_else_are_text(tmp_path: Path) -> None:
    assert read("a: off\nb: yes\nc: 1:30\nd: 2020-01-01\ne: 1_000", tmp_path) == {
        "a": "off",
        "b": "yes",
        "c": "1:30",
        "d": "2020-01-01",
        "e": "1_000",
    }


def test_numbers_booleans_and_null_are_typed(tmp_path: Path) -> None:
    text = "a: 1e-3\nb: 0x10\nc: true\nd: null\ne: -2\nf: .5\ng: 010\nh: ~\ni:\n"
    assert list(read(text, tmp_path).values()) == [0.001, 16, True, None, -2, 0.5, 10, None, None]


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    document = read("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n", tmp_path)
    assert document["b"] == {"x": 1, "y": 3}


def test_environment_variables_are_replaced_and_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_TEST_PORT", "9000")
    monkeypatch.setenv("BATON_TEST_EMPTY", "")
    text = (
        "a: ${BATON_TEST_PORT}\n"
        'b: "${BATON_TEST_PORT}"\n'
        "c: http://host:${BATON_TEST_PORT}/${BATON_TEST_UNSET:-x:y}\n"
        "d: ${BATON_TEST_UNSET:-8000}\n"
        "e: ${BATON_TEST_EMPTY:-full}\n"
        "f: a$${BATON_TEST_PORT}\n"
    )
    assert read(text, tmp_path) == {
        "a": 9000,
        "b": "9000",
        "c": "http://host:9000/x:y",
        "d": 8000,
        "e": "full",
        "f": "a${BATON_TEST_PORT}",
    }
