"""`baton profile` measures a real engine, and workers behind gRPC."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.types import Role
from deploy.profiling.cluster_target import ClusterTarget
from deploy.profiling.command import run_profile
from deploy.profiling.link import fit_link
from deploy.profiling.measure import Measuring
from deploy.profiling.plan import GridSize, WorkerLimits, measurement_plan
from deploy.profiling.target import Prompts, TargetFacts
from deploy.tiny_model import make_tiny_model
from tests.integration.mock_workers import MODEL, MockCluster

pytestmark = pytest.mark.engine

SMALL = GridSize(num_prompts=4, num_repeats=5, num_batches=2, num_contexts=2, num_steps=8, num_transfers=3)
DECODE_BASE_MS, DECODE_MS_PER_SEQ, PREFILL_MS_PER_TOKEN = 30.0, 4.0, 0.4


def write_config(directory: Path, **engine_args: object) -> Path:
    model_path = make_tiny_model(directory / "tiny")
    shape = {
        "name": "cpu",
        "count": 1,
        "initial": {"decode": 1},
        "gpus_per_worker": 0,
        "engine_args": {
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 32 << 20,
            "max_num_seqs": 4,
            **engine_args,
        },
    }
    config = {
        "models": [
            {
                "name": "tiny",
                "path": str(model_path),
                "slo": {"ttft_ms": 2000, "tpot_ms": 200},
                "shapes": [shape],
            }
        ],
        "kv_transfer": {"buffer_device": "cpu"},
        "startup_timeout_s": 100,
    }
    path = directory / "cluster.yaml"
    path.write_text(json.dumps(config))
    return path


def test_a_fresh_paced_engine_is_measured_at_its_pace(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        worker_cls="engine.paced_worker.PacedCPUWorker",
        additional_config={
            "baton_pace_decode_base_ms": DECODE_BASE_MS,
            "baton_pace_decode_ms_per_seq": DECODE_MS_PER_SEQ,
            "baton_pace_prefill_base_ms": DECODE_BASE_MS,
            "baton_pace_prefill_ms_per_token": PREFILL_MS_PER_TOKEN,
        },
    )
    out, plot = tmp_path / "profile.json", tmp_path / "profile.svg"

    profile = run_profile(str(config), out, fresh=True, plot=plot, max_minutes=1.0, grid=SMALL)

    from simulator.profiles.files import read_profile

    assert len(read_profile(out).decode) == len(profile.decode) >= 3
    assert "<svg" in plot.read_text()
    assert (profile.accelerator, profile.gpus_per_worker, profile.max_num_seqs) == ("CPU", 0, 4)
    assert 1.0 < profile.startup_s < 100.0
    for prompt in profile.prefill:
        expected_ms = DECODE_BASE_MS + PREFILL_MS_PER_TOKEN * prompt.prompt_tokens
        assert 0.98 < 1e3 * prompt.seconds / expected_ms < 1.15
    for step in profile.decode:
        expected_ms = DECODE_BASE_MS + DECODE_MS_PER_SEQ * step.num_decoding
        assert 1e3 * step.seconds == pytest.approx(expected_ms, rel=0.15)


async def test_a_worker_of_a_running_cluster_is_measured_over_grpc() -> None:
    async with MockCluster(1, 1) as cluster:
        prefill, decode = (cluster.of(role)[0] for role in (Role.PREFILL, Role.DECODE))
        links = {member.report.worker_id: member.link for member in cluster.view.members()}
        info = decode.engine.info
        limits = WorkerLimits(
            max_model_len=4096,
            num_kv_blocks=info.num_kv_blocks,
            block_size_tokens=info.block_size_tokens,
            kv_bytes_per_token=info.bytes_per_block // info.block_size_tokens,
            max_num_seqs=16,
            max_num_batched_tokens=8192,
        )
        facts = TargetFacts(
            model=MODEL, accelerator="mock", gpus_per_worker=1, source="a test", startup_s=None
        )
        target = ClusterTarget(links[decode.worker_id], links[prefill.worker_id], limits, facts, 10.0)

        measured = await Measuring(
            target,
            measurement_plan(limits, SMALL),
            budget_s=30.0,
            on_progress=lambda share, what: None,
            prompts=Prompts(seed=3),
        ).run()

        assert measured.num_skipped == 0
        for prompt in measured.prefill:
            expected_s = (2.0 + 0.02 * prompt.prompt_tokens) / 1e3
            assert expected_s == pytest.approx(prompt.seconds, abs=0.05)
        for step in measured.decode:
            assert 2e-4 < step.seconds < 20e-3
        assert 0.005 < fit_link(measured.transfers).transfer_s(200_000_000) < 0.1
        for worker in cluster.workers:
            assert worker.engine.load().num_running == 0
            assert worker.engine.load().num_pinned == 0


def test_a_profile_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        run_profile("nowhere.yaml", tmp_path / "missing" / "profile.json", fresh=True)
