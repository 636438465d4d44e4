"""`baton simulate` and `baton plan`: what they write, print and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy import cli
from simulator.profiles.files import packaged_profile, write_profile
from tests.unit.test_cli import CONFIG

LOAD = "poisson:rate=6,prompt=600~2000,output=20..60,duration=20"
AZURE = Path(__file__).parents[1] / "data" / "traces" / "azure2023_conv.csv"
PROFILE = "h200-llama-3.1-8b-fp8-tp1"


def baton(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def figures(tmp_path: Path, *arguments: object) -> dict[str, object]:
    out = tmp_path / "out.json"
    result = baton("simulate", "--json", out, *arguments)
    assert result.exit_code == 0, result.output
    return dict(json.loads(out.read_text()))


class TestSimulate:
    def test_a_trace_file_is_enough(self, tmp_path: Path) -> None:
        summary = figures(tmp_path, "--trace", AZURE)
        assert summary["num_done"] == summary["num_requests"]
        assert summary["settings"]["workers"] == {"worker": {"prefill": 4, "decode": 4}}  # type: ignore[index]

    def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(self, tmp_path: Path) -> None:
        def run(seed: int, name: str) -> bytes:
            out = tmp_path / name
            assert baton("simulate", "--trace", LOAD, "--seed", seed, "--json", out).exit_code == 0
            return out.read_bytes()

        assert run(1, "a.json") == run(1, "b.json")
        assert run(1, "a.json") != run(2, "c.json")

    def test_the_time_it_took_is_added_on_request(self, tmp_path: Path) -> None:
        assert "wall_s" not in figures(tmp_path, "--trace", LOAD)
        assert figures(tmp_path, "--trace", LOAD, "--timing")["wall_s"] > 0  # type: ignore[operator]

    def test_the_figures_can_go_to_standard_output(self) -> None:
        result = baton("simulate", "--trace", LOAD, "--json", "-")
        assert json.loads(result.stdout)["num_failed"] == 0

    def test_a_report_is_written(self, tmp_path: Path) -> None:
        page = tmp_path / "report.html"
        assert baton("simulate", "--trace", LOAD, "--html", page).exit_code == 0
        assert "<html" in page.read_text()

    def test_a_saved_trace_gives_the_same_figures(self, tmp_path: Path) -> None:
        saved = tmp_path / "saved.jsonl.gz"
        first = figures(tmp_path, "--trace", LOAD, "--save-trace", saved)
        again = figures(tmp_path, "--trace", saved)
        first.pop("settings")
        again.pop("settings")
        assert first == again

    def test_what_is_taken_of_a_trace_can_be_chosen(self, tmp_path: Path) -> None:
        assert figures(tmp_path, "--trace", AZURE, "--requests", 7)["num_requests"] == 7
        slow = figures(tmp_path, "--trace", AZURE, "--start", 10, "--duration", 20)
        fast = figures(tmp_path, "--trace", AZURE, "--start", 10, "--duration", 20, "--rate-scale", 2)
        assert fast["num_requests"] == slow["num_requests"]
        assert fast["simulated_s"] < slow["simulated_s"]  # type: ignore[operator]

    def test_the_split_the_targets_and_the_profiles_can_be_chosen(self, tmp_path: Path) -> None:
        mine = tmp_path / "mine.json"
        write_profile(packaged_profile(PROFILE), mine)
        options = ("--prefill", 1, "--decode", 2, "--ttft-ms", 1, "--routers", 3)
        both = ("--profile", f"prefill={mine}", "--profile", "decode=h100-llama-3.1-8b-fp8-tp2")
        summary = figures(tmp_path, "--trace", LOAD, *options, *both)
        settings = summary["settings"]
        assert summary["attainment"] == 0
        assert settings["workers"] == {"prefill": {"prefill": 1}, "decode": {"decode": 2}}  # type: ignore[index]
        assert settings["routers"] == 3  # type: ignore[index]

    def test_a_configuration_gives_workers_targets_and_profile(self, tmp_path: Path) -> None:
        shape = {**CONFIG["models"][0]["shapes"][0], "profile": PROFILE}
        config = tmp_path / "cluster.yaml"
        config.write_text(json.dumps({**CONFIG, "models": [{**CONFIG["models"][0], "shapes": [shape]}]}))
        summary = figures(tmp_path, "--trace", LOAD, "--config", config)
        assert summary["slo"] == {"ttft_ms": 100, "tpot_ms": 10}
        assert summary["settings"]["workers"] == {"mocks": {"prefill": 1, "decode": 2}}  # type: ignore[index]
        assert summary["settings"]["profiles"] == {"mocks": PROFILE}  # type: ignore[index]

    def test_the_policy_can_be_chosen(self, tmp_path: Path) -> None:
        trace = "sessions:rate=1,turns=4,think=2s,user=400,output=20,system=2000,duration=40,block=64"
        plain = figures(tmp_path, "--trace", trace, "--policy", "round_robin")
        predicted = figures(tmp_path, "--trace", trace, "--policy", "predictive")
        assert predicted["cached_share"] > plain["cached_share"]  # type: ignore[operator]

    def test_actions_happen(self, tmp_path: Path) -> None:
        actions = ("--action", "5 switch worker-4 prefill", "--action", "6 kill worker-0")
        summary = figures(tmp_path, "--trace", LOAD, *actions)
        assert summary["role_switches"] == 1
        assert summary["settings"]["actions"] == ["5 switch worker-4 prefill", "6 kill worker-0"]  # type: ignore[index]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--trace", "no/such.csv"), "no/such.csv"),
            (("--trace", "poisson:rate=5"), "prompt"),
            (("--trace", LOAD, "--profile", "h9000"), "there is no profile 'h9000'"),
            (("--trace", LOAD, "--policy", "magic"), "there is no routing policy 'magic'"),
            (("--trace", LOAD, "--action", "5 explode worker-0"), "is no action"),
            (("--trace", LOAD, "--action", "5 add h9000 prefill"), "no shape 'h9000'"),
            (("--trace", LOAD, "--ttft-ms", 0), "--ttft-ms"),
            (("--trace", LOAD, "--start", 1000), "nothing of the trace"),
            (("--trace", AZURE, "--columns", "ts"), "--columns"),
            (("--trace", LOAD, "--json", "no/such/folder/out.json"), "cannot write"),
        ],
    )
    def test_wrong_options_get_one_message(self, arguments: tuple[object, ...], message: str) -> None:
        result = baton("simulate", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.output

    def test_a_configuration_without_a_profile_says_how_to_give_one(self, tmp_path: Path) -> None:
        config = tmp_path / "cluster.yaml"
        config.write_text(json.dumps(CONFIG))
        result = baton("simulate", "--trace", LOAD, "--config", config)
        assert result.exit_code == 2
        assert "--profile mocks=NAME" in result.stderr


class TestPlan:
    def test_it_names_the_best_split_and_shows_the_search(self, tmp_path: Path) -> None:
        out = tmp_path / "plan.json"
        result = baton("plan", "--trace", LOAD, "--gpus", 3, "--jobs", 1, "--json", out)
        assert result.exit_code == 0, result.output
        assert "best split of 3 GPUs" in result.stdout
        assert json.loads(out.read_text())["trace"]

    def test_a_wrong_profile_gets_one_message(self) -> None:
        result = baton("plan", "--trace", LOAD, "--profile", "h9000")
        assert result.exit_code == 2
        assert "there is no profile 'h9000'" in result.stderr
