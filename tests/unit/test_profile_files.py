"""Profiles on disk: our JSON, published tables, and what comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.performance_profile import DecodePoint, PrefillPoint
from simulator.profiles.csv_tables import CsvOptions
from simulator.profiles.files import (
    find_profile,
    packaged_profile,
    packaged_profiles,
    read_profile,
    write_profile,
)

PERF = Path(__file__).parents[1] / "data" / "perf"
LLAMA_8B = {"model": "llama-3.1-8b", "gpu": "h100_sxm", "dtype": "fp8", "tp": "1"}


class TestJson:
    @pytest.mark.parametrize("name", packaged_profiles())
    def test_a_written_profile_reads_back_the_same(self, name: str, tmp_path: Path) -> None:
        profile = packaged_profile(name)
        write_profile(profile, tmp_path / "copy.json")
        assert read_profile(tmp_path / "copy.json") == profile

    def test_cached_prompts_survive(self, tmp_path: Path) -> None:
        (tmp_path / "x_prefill.csv").write_text(
            "prompt_tokens,context_tokens,ttft_ms\n100,,10\n1000,,30\n1000,900,12\n"
        )
        (tmp_path / "x_decode.csv").write_text((PERF / "measured_llama_8b_decode.csv").read_text())
        profile = read_profile(tmp_path / "x")
        assert profile.prefill[2] == PrefillPoint(prompt_tokens=1000, context_tokens=900, seconds=12 / 1e3)
        write_profile(profile, tmp_path / "x.json")
        assert read_profile(tmp_path / "x.json") == profile

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": "other/1"}, "is no profile"),
            ({"model": None}, "lacks 'model'"),
            ({"max_num_seqs": "many"}, "'max_num_seqs' must be of type int, not 'many'"),
            ({"max_num_seqs": True}, "'max_num_seqs' must be of type int, not True"),
            ({"speed": 3}, "unknown keys, remove them: speed"),
            ({"link": {"latency_ms": 1}}, "link lacks 'gigabytes_per_s'"),
            ({"prefill": [3]}, r"prefill\[0\] must be an object"),
            ({"decode": [{"num_decoding": 1, "kv_tokens": 5, "ms": "x"}]}, r"decode\[0\]: 'ms' must be"),
            ({"decode": [{"num_decoding": 1, "kv_tokens": 5, "ms": -1}]}, "took -0.001 s"),
        ],
    )
    def test_a_wrong_file_is_refused(self, changes: dict[str, object], message: str, tmp_path: Path) -> None:
        write_profile(packaged_profile("h200-llama-3.1-8b-fp8-tp1"), tmp_path / "wrong.json")
        data = json.loads((tmp_path / "wrong.json").read_text()) | changes
        (tmp_path / "wrong.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
        with pytest.raises(ConfigError, match=message):
            read_profile(tmp_path / "wrong.json")

    def test_no_json_and_no_file_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "wrong.json").write_text("{")
        with pytest.raises(ConfigError, match="is not JSON"):
            read_profile(tmp_path / "wrong.json")
        with pytest.raises(ConfigError, match="cannot read"):
            read_profile(tmp_path / "missing.json")


class TestMeasuredTables:
    @pytest.mark.parametrize("end", ["", "_prefill.csv", "_decode.csv"])
    def test_either_table_or_their_prefix_gives_the_pair(self, end: str) -> None:
        profile = read_profile(PERF / f"measured_llama_8b{end}")
        assert profile.name == "measured_llama_8b"
        assert profile.kv_capacity_tokens == 945_029
        assert profile.kv_bytes_per_token == 131_072
        assert profile.prefill[0] == PrefillPoint(prompt_tokens=100, seconds=19.525 / 1e3)
        assert profile.decode[3] == DecodePoint(num_decoding=48, kv_tokens=146_853, seconds=9.937 / 1e3)

    def test_the_batch_follows_from_kv_use_where_it_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "x_prefill.csv").write_text("prompt_tokens,ttft_ms\n100,10\n1000,30\n")
        (tmp_path / "x_decode.csv").write_text(
            "kv_usage,context_tokens,itl_ms,max_kv_tokens\n0.001,1000,5,1000000\n0.5,1000,20,1000000\n"
        )
        profile = read_profile(tmp_path / "x")
        assert [(p.num_decoding, p.kv_tokens) for p in profile.decode] == [(1, 1000), (500, 500_000)]
        assert "assumed" in profile.source

    def test_the_kv_use_follows_from_the_batch_where_it_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "x_prefill.csv").write_text("prompt_tokens,ttft_ms\n100,10\n1000,30\n")
        (tmp_path / "x_decode.csv").write_text("context_tokens,itl_ms,implied_batch\n1000,5,1\n1000,20,500\n")
        profile = read_profile(tmp_path / "x", csv=CsvOptions(kv_bytes_per_token=5))
        assert [(p.num_decoding, p.kv_tokens) for p in profile.decode] == [(1, 1000), (500, 500_000)]
        assert profile.kv_bytes_per_token == 5


class TestComposedTables:
    def test_one_profile_is_selected_and_overhead_is_added(self) -> None:
        profile = read_profile(PERF / "composed_decode.csv", csv=CsvOptions(selection=LLAMA_8B))
        assert profile.prefill[0].seconds == pytest.approx(0.005299 + 0.020)
        assert profile.decode[-1].seconds == pytest.approx(0.015697 + 64 * 0.00003)
        assert (profile.decode[-1].num_decoding, profile.decode[-1].kv_tokens) == (64, 64 * 4096)
        assert profile.kv_capacity_tokens == pytest.approx(457_175, rel=0.001)
        assert (profile.model, profile.accelerator, profile.gpus_per_worker) == (
            "llama-3.1-8b",
            "h100_sxm",
            1,
        )

    def test_extrapolated_rows_are_left_out(self) -> None:
        profile = read_profile(PERF / "composed", csv=CsvOptions(selection=LLAMA_8B))
        assert max(point.prompt_tokens for point in profile.prefill) == 16_384

    def test_overhead_is_the_callers_choice(self) -> None:
        options = CsvOptions(selection=LLAMA_8B, prefill_overhead_s=0.0, decode_overhead_s_per_seq=0.0)
        profile = read_profile(PERF / "composed", csv=options)
        assert profile.prefill[0].seconds == pytest.approx(0.005299)
        assert profile.decode[-1].seconds == pytest.approx(0.015697)

    def test_a_part_of_the_selection_is_enough_if_it_leaves_one(self) -> None:
        profile = find_profile(f"{PERF}/composed:tp=4,dtype=bf16")
        assert profile.model == "llama-3.1-70b"
        assert profile.kv_bytes_per_token == 327_680
        assert profile.gpus_per_worker == 4

    @pytest.mark.parametrize(
        ("selection", "message"),
        [
            (
                "",
                "holds more than one profile: select one of model=llama-3.1-70b,gpu=h100_sxm,dtype=bfloat16",
            ),
            (":tp=2", "holds no profile of that selection: select one of model=llama-3.1-70b"),
            (":size=2", "selects nothing"),
        ],
    )
    def test_a_wrong_selection_says_what_is_there(self, selection: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            find_profile(f"{PERF}/composed_prefill.csv{selection}")


class TestTableErrors:
    @pytest.mark.parametrize(
        ("prefill", "decode", "message"),
        [
            ("prompt_tokens,ttft_ms\n1,2\n", None, "needs a pair"),
            ("prompt_tokens,ttft_ms\n", "batch,context,itl_ms\n1,2,3\n", "has no measured rows"),
            ("prompt_tokens,ttft_ms\nx,2\n", "batch,context,itl_ms\n1,2,3\n", "'x' is no number"),
            ("prompt_tokens\n1\n", "batch,context,itl_ms\n1,2,3\n", "column ttft_ms or prefill_ms"),
            ("prompt_tokens,ttft_ms\n1,2\n", "itl_ms\n3\n", "needs batch, implied_batch, or kv_usage"),
        ],
    )
    def test_the_message_names_the_column(
        self, prefill: str, decode: str | None, message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "x_prefill.csv").write_text(prefill)
        if decode is not None:
            (tmp_path / "x_decode.csv").write_text(decode)
        with pytest.raises(ConfigError, match=message):
            read_profile(tmp_path / "x")

    def test_a_selection_of_a_column_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="has no column 'tp'"):
            find_profile(f"{PERF}/measured_llama_8b:tp=1")


class TestPackagedProfiles:
    def test_names_lead_to_profiles_of_that_name(self) -> None:
        assert "h200-llama-3.1-8b-fp8-tp1" in packaged_profiles()
        for name in packaged_profiles():
            profile = find_profile(name)
            assert profile.name == name
            assert "Apache-2.0" in profile.source

    def test_an_unknown_name_lists_what_there_is(self) -> None:
        with pytest.raises(ConfigError, match=r"there is no profile 'b300'.*h200-llama-3.1-8b-fp8-tp1"):
            find_profile("b300")
        with pytest.raises(ConfigError, match="there is no packaged profile"):
            packaged_profile("b300")

    def test_a_json_file_takes_no_selection(self, tmp_path: Path) -> None:
        write_profile(packaged_profile("h200-llama-3.1-8b-fp8-tp1"), tmp_path / "x.json")
        assert find_profile(str(tmp_path / "x.json")).name == "h200-llama-3.1-8b-fp8-tp1"
        with pytest.raises(ConfigError, match="drop the selection"):
            find_profile(f"{tmp_path / 'x.json'}:tp=1")
