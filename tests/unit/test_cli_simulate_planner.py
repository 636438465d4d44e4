"""`baton simulate --planner` and `baton plan --planner`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deploy import cli
from tests.unit.test_cli import CONFIG

LOAD = "poisson:rate=6,prompt=600~2000,output=20..60,duration=20"
PROFILE = "h200-llama-3.1-8b-fp8-tp1"


def baton(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def figures(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    out = tmp_path / "out.json"
    result = baton("simulate", "--trace", LOAD, "--json", out, *arguments)
    assert result.exit_code == 0, result.output
    return dict(json.loads(out.read_text()))


def config_file(tmp_path: Path, **planner: object) -> Path:
    shape = {**CONFIG["models"][0]["shapes"][0], "profile": PROFILE}
    path = tmp_path / "cluster.yaml"
    models = [{**CONFIG["models"][0], "shapes": [shape]}]
    path.write_text(json.dumps({**CONFIG, "models": models, "planner": planner}))
    return path


class TestSimulate:
    def test_the_planner_looks_and_its_decisions_are_told(self, tmp_path: Path) -> None:
        page = tmp_path / "report.html"
        out = tmp_path / "out.json"
        result = baton("simulate", "--trace", LOAD, "--planner", "--html", page, "--json", out)
        assert result.exit_code == 0, result.output
        assert "the planner's decisions" in result.stdout
        assert "The planner's decisions" in page.read_text()
        summary = json.loads(out.read_text())
        assert summary["planner"]["num_looks"] >= 20
        assert summary["settings"]["planner"]["workers"] == {"worker": [8, 8]}
        assert summary["planner"]["mean_gpus"] == 8

    def test_a_seed_gives_one_file_and_timing_is_added_on_request(self, tmp_path: Path) -> None:
        first, again = figures(tmp_path, "--planner"), figures(tmp_path, "--planner")
        assert first == again
        timed = figures(tmp_path, "--planner", "--timing")
        assert 0 < timed["planner_cpu_s"]["max"] <= timed["planner_cpu_s"]["total"]

    def test_without_it_nothing_is_told_of_it(self, tmp_path: Path) -> None:
        summary = figures(tmp_path)
        assert "planner" not in summary
        assert "planner" not in summary["settings"]

    def test_a_budget_lets_it_grow_and_counts_can_be_bounded(self, tmp_path: Path) -> None:
        grown = figures(tmp_path, "--planner", "--gpu-budget", 12)
        assert grown["settings"]["planner"]["workers"] == {"worker": [8, 12]}
        bounded = figures(
            tmp_path, "--planner", "--gpu-budget", 12, "--min-workers", 2, "--max-workers", "worker=9"
        )
        assert bounded["settings"]["planner"]["workers"] == {"worker": [2, 9]}
        assert bounded["settings"]["planner"]["gpu_budget"] == 12

    @pytest.mark.parametrize(
        ("mode", "options", "plans"),
        [
            ("auto", (), True),
            ("auto", ("--no-planner",), False),
            ("advise", (), False),
            ("off", (), False),
            ("off", ("--planner",), True),
        ],
    )
    def test_the_configuration_says_whether_unless_an_option_does(
        self, tmp_path: Path, mode: str, options: tuple[str, ...], plans: bool
    ) -> None:
        summary = figures(tmp_path, "--config", config_file(tmp_path, mode=mode), *options)
        assert ("planner" in summary) is plans

    def test_the_configuration_says_how(self, tmp_path: Path) -> None:
        config = config_file(tmp_path, mode="auto", interval_s=0.5, hold_s=7, spares=1, attainment_target=0.9)
        summary = figures(tmp_path, "--config", config)
        chosen = summary["settings"]["planner"]
        assert chosen["interval_s"] == 0.5
        assert (chosen["hold_s"], chosen["spares"], chosen["attainment_target"]) == (7, 1, 0.9)
        assert chosen["workers"] == {"mocks": [3, 3]}
        assert summary["planner"]["num_looks"] >= 40

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--gpu-budget", 9), "go with --planner"),
            (("--max-workers", 9), "go with --planner"),
            (("--planner", "--gpu-budget", 4), "more than the budget of 4"),
            (("--planner", "--min-workers", 9), "may have 9 to 8"),
            (("--planner", "--max-workers", "h9000=9"), "there is no shape 'h9000'"),
            (("--planner", "--min-workers", "few"), "--min-workers takes N or SHAPE=N"),
        ],
    )
    def test_wrong_options_get_one_message(self, arguments: tuple[object, ...], message: str) -> None:
        result = baton("simulate", "--trace", LOAD, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.output


class TestPlan:
    def test_the_planner_is_set_beside_the_best_static_split(self, tmp_path: Path) -> None:
        out = tmp_path / "plan.json"
        result = baton("plan", "--trace", LOAD, "--gpus", 3, "--jobs", 1, "--planner", "--json", out)
        assert result.exit_code == 0, result.output
        assert "best static split" in result.stdout
        assert "planner, from 1P+2D" in result.stdout
        told = json.loads(out.read_text())["planner"]
        assert (told["start"], told["min_gpus"]) == ("1P+2D", 3)
        assert told["summary"]["planner"]["mean_gpus"] == 3
        assert told["summary"]["num_done"] == told["summary"]["num_requests"]

    def test_kinds_of_workers_that_cannot_swap_roles_begin_with_the_best_split(self, tmp_path: Path) -> None:
        out = tmp_path / "plan.json"
        result = baton(
            *("plan", "--trace", LOAD, "--gpus", 5, "--jobs", 1, "--max-gpus", 5, "--planner", "--json", out),
            *("--prefill-profile", PROFILE, "--decode-profile", "h100-llama-3.1-8b-fp8-tp2"),
        )
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text())
        assert found["planner"]["start"] == found["best"]["split"]
        assert found["planner"]["summary"]["planner"]["mean_gpus"] <= 5

    def test_the_busiest_window_is_what_both_are_judged_on(self, tmp_path: Path) -> None:
        out = tmp_path / "plan.json"
        load = LOAD.replace("duration=20", "duration=60")
        options = ("--gpus", 2, "--jobs", 1, "--max-gpus", 2, "--busiest-minutes", 0.3)
        result = baton("plan", "--trace", load, *options, "--planner", "--json", out)
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text())
        assert found["planner"]["summary"]["num_requests"] == found["num_requests"] < 200

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--min-gpus", 2), "goes with --planner"),
            (("--planner", "--min-gpus", 9), "--min-gpus must be 1 to 3"),
        ],
    )
    def test_wrong_options_get_one_message(self, arguments: tuple[object, ...], message: str) -> None:
        result = baton("plan", "--trace", LOAD, "--gpus", 3, "--jobs", 1, "--max-gpus", 3, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
