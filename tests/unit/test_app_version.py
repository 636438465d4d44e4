"""Deployments' versions: only what changes a replica changes its version."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from ray import serve
from ray.serve._private.build_app import build_app

from core.types import Role
from deploy import app_version
from deploy.app import build_application
from deploy.app_version import bind_versioned
from deploy.config import parse_config

SHAPE = {
    "name": "a",
    "count": 2,
    "initial": {"prefill": 1, "decode": 1},
    "gpus_per_worker": 0,
    "engine": "mock",
}
MODEL = {"name": "m", "path": "org/m", "slo": {"ttft_ms": 1, "tpot_ms": 1}, "shapes": [SHAPE]}
CONFIG: dict[str, Any] = {"models": [MODEL], "kv_transfer": {"buffer_device": "cpu"}}


def versions(**changes: Any) -> dict[str, str]:
    """By deployment.

    Args:
        changes: of the shape, or of the router with ``router=``.
    """
    raw = copy.deepcopy(CONFIG)
    raw["router"] = changes.pop("router", {})
    raw["models"][0]["shapes"][0].update(changes)
    built = build_app(build_application(parse_config(raw)), name="baton")
    return {deployment.name: deployment.version for deployment in built.deployments}


@pytest.fixture(autouse=True)
def same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CLUSTER_KEY", "0123456789abcdef")


def test_the_same_configuration_makes_the_same_versions() -> None:
    assert versions() == versions()
    assert versions().keys() == {"Registry", "Router", "Worker-a"}


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 3, "initial": {"prefill": 1, "decode": 2}},
        {"initial": {"prefill": 0, "decode": 2}},
        {"min_count": 1, "max_count": 5},
        {"router": {"replicas": 3}},
    ],
)
def test_counts_are_no_part_of_a_version(changes: dict[str, Any]) -> None:
    assert versions(**changes) == versions()


def test_what_a_replica_is_started_with_is() -> None:
    before, after = versions(), versions(mock={"decode_step_ms": 1.0})
    assert {name for name in before if before[name] != after[name]} == {"Worker-a"}
    after = versions(router={"policy": "random"})
    assert {name for name in before if before[name] != after[name]} == {"Router", "Worker-a"}


def test_another_key_is_another_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    before = versions()
    monkeypatch.setenv("BATON_CLUSTER_KEY", "another-0123456789")
    after = versions()
    assert {name for name in before if before[name] != after[name]} == {"Worker-a"}


def test_other_code_is_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = versions()
    monkeypatch.setattr(app_version, "_code_digest", lambda: b"other")
    assert all(before[name] != version for name, version in versions().items())


@dataclass
class Settings:
    roles: frozenset[Role]
    arguments: dict[str, Any]


def test_the_order_of_a_set_is_no_difference() -> None:
    """Text hashes differ from process to process, and with them the order of sets."""
    script = (
        "from tests.unit.test_app_version import *\n"
        "settings = Settings(frozenset(Role), {name: 1 for name in {'x', 'yy', 'zzz'}})\n"
        "print(bind_versioned(serve.deployment(Settings), settings)._bound_deployment.version)"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(TypeError, match="two object are equal"):
        bind_versioned(serve.deployment(Settings), object())
