"""One cluster and one plain vLLM for all tests that compare them, started when the first test asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import tiny_model
from deploy.config import load_config
from tests.integration.adapter import make_adapter
from tests.integration.cluster_process import READY, start_cluster
from tests.integration.plain_vllm import start_plain_vllm
from tests.integration.served import Served, ServedByBaton
from tests.integration.server_process import HOST, answers, free_port

MODEL = "tiny"
ADAPTER = "tiny-adapted"
START_TIMEOUT_S = 180.0
ENGINE_ARGS = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 128 << 20,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "reasoning_parser": "deepseek_v3",
    "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"},
}
FRONT_END_ARGS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests of the shared cluster last: no other test shares the machine, or Ray's ports, with it."""
    items.sort(key=lambda item: "servers" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose tokenizer can also mark where reasoning begins and ends."""
    return make_reasoning_model(tmp_path_factory.mktemp("model") / "tiny")


def make_reasoning_model(directory: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "SPECIAL_TOKENS", [*tiny_model.SPECIAL_TOKENS, "<think>", "</think>"])
        return tiny_model.make_tiny_model(directory)


@pytest.fixture(scope="session")
def adapter_path(model_path: Path) -> Path:
    return make_adapter(model_path.parent / "adapter", model_path)


@pytest.fixture(scope="session")
def servers(
    model_path: Path, adapter_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServedByBaton, Served]]:
    """The cluster and the reference; they start at the same time."""
    run_dir = tmp_path_factory.mktemp("servers")
    config_path = run_dir / "cluster.yaml"
    config_path.write_text(json.dumps(_configuration(model_path, adapter_path)))
    config = load_config(config_path)
    plain_port = free_port()
    cluster = start_cluster(config_path, run_dir / "cluster.log")
    try:
        plain = start_plain_vllm(config, plain_port, run_dir / "plain.log")
        try:
            ours = ServedByBaton(f"http://{HOST}:{config.router.port}", MODEL, cluster.pid)
            theirs = Served(f"http://{HOST}:{plain_port}", MODEL)
            plain.wait_until(lambda: answers(f"{theirs.url}/health"), START_TIMEOUT_S)
            cluster.wait_until(lambda: READY in cluster.log_tail(), START_TIMEOUT_S)
            yield ours, theirs
            ours.close()
            theirs.close()
        finally:
            plain.stop(grace_s=15)
    finally:
        cluster.stop(grace_s=40)


@pytest.fixture(scope="session")
def cluster(servers: tuple[ServedByBaton, Served]) -> ServedByBaton:
    return servers[0]


@pytest.fixture(scope="session")
def plain(servers: tuple[ServedByBaton, Served]) -> Served:
    return servers[1]


def _configuration(model_path: Path, adapter_path: Path) -> dict[str, Any]:
    return {
        "models": [
            {
                "name": MODEL,
                "path": str(model_path),
                "slo": {"ttft_ms": 2000, "tpot_ms": 200},
                "adapters": [{"name": ADAPTER, "path": str(adapter_path)}],
                "shapes": [
                    {
                        "name": "cpu",
                        "count": 2,
                        "initial": {"prefill": 1, "decode": 1},
                        "gpus_per_worker": 0,
                        "cpus_per_worker": 0.25,
                        "engine_args": ENGINE_ARGS,
                    }
                ],
            }
        ],
        "router": {
            "port": free_port(),
            "vllm_args": FRONT_END_ARGS,
            # A full machine of two cores is late for everything; what is tested is that nothing is lost.
            "admission": {"early_rejection": False, "max_wait_s": 300.0},
        },
        "planner": {"mode": "advise"},
        "kv_transfer": {"buffer_device": "cpu"},
        "startup_timeout_s": START_TIMEOUT_S,
        "drain_timeout_s": 5,
    }
