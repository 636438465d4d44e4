"""The configuration file: what is accepted, and what is said about what is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from core.errors import ConfigError
from core.types import Role
from deploy import config_docs
from deploy.config import load_config, parse_config
from deploy.config_checks import require_local_files
from deploy.config_engine_args import ENGINE_ARGS_FIXED_AT_1, ENGINE_ARGS_SET_BY_BATON, vllm_engine_arg_names
from deploy.config_schema import AdmissionConfig, BatonConfig
from deploy.settings import admission_limits
from router.admission_limits import AdmissionLimits

CONFIGS = Path(config_docs.__file__).parent / "configs"

VALID: dict[str, Any] = {
    "models": [
        {
            "name": "demo",
            "path": "org/model",
            "slo": {"ttft_ms": 500, "tpot_ms": 50.5},
            "shapes": [
                {
                    "name": "cpu",
                    "count": 2,
                    "initial": {"prefill": 1, "decode": 1},
                    "gpus_per_worker": 0,
                    "engine_args": {"max_model_len": 4096},
                }
            ],
        }
    ],
    "kv_transfer": {"buffer_device": "cpu"},
}

Edit = Callable[[dict[str, Any]], object]


def edited(edit: Edit) -> dict[str, Any]:
    raw = copy.deepcopy(VALID)
    edit(raw)
    return raw


def problems_of(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, source="FILE")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("FILE: ") for line in lines)
    return [line.removeprefix("FILE: ") for line in lines]


def model(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["models"][0]


def shape(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["models"][0]["shapes"][0]


def on_gpus(raw: dict[str, Any], num_gpus: float, tp_size: int) -> None:
    shape(raw).update(gpus_per_worker=num_gpus, engine_args={"tensor_parallel_size": tp_size})


def add_shape(raw: dict[str, Any], **changes: Any) -> None:
    model(raw)["shapes"].append({**shape(raw), "name": "other", **changes})


def as_mock(raw: dict[str, Any], **changes: Any) -> None:
    shape(raw).update({"engine": "mock", "engine_args": {}, **changes})


def test_a_minimal_configuration_gets_the_documented_defaults() -> None:
    config = parse_config(VALID)
    worker_shape = config.models[0].shapes[0]
    assert worker_shape.roles == (Role.PREFILL, Role.DECODE)
    assert worker_shape.engine == "vllm"
    assert config.models[0].slo.ttft_ms == 500.0
    assert config.router.haproxy is True
    assert config.router.host == "127.0.0.1"
    assert config.planner.mode == "off"
    assert config.ray.address is None


@pytest.mark.parametrize(
    ("name", "num_prefill", "num_decode", "num_gpus"),
    [("demo-cpu", 2, 2, 0), ("8xh100-8b", 4, 4, 8), ("2-nodes-70b", 2, 2, 16)],
)
def test_every_ready_file_is_valid_and_has_the_workers_its_name_promises(
    name: str, num_prefill: int, num_decode: int, num_gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_DEMO_MODEL", "/models/demo")
    config = load_config(CONFIGS / f"{name}.yaml")
    (worker_shape,) = config.models[0].shapes
    assert (worker_shape.initial.prefill, worker_shape.initial.decode) == (num_prefill, num_decode)
    assert worker_shape.count * worker_shape.gpus_per_worker == num_gpus


def test_every_ready_file_is_tested() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == {"demo-cpu", "8xh100-8b", "2-nodes-70b"}


def test_the_documentation_page_is_up_to_date() -> None:
    assert config_docs.PAGE.read_text(encoding="utf-8") == config_docs.page()


def test_every_key_has_a_meaning_in_the_documentation() -> None:
    rows = [line.split(" | ") for line in config_docs.page().splitlines() if line.startswith("| `")]
    assert [cells[0] for cells in rows if not cells[-1].strip(" |")] == []


def test_a_configuration_cannot_be_changed() -> None:
    config = parse_config(VALID)
    with pytest.raises(ValidationError, match="frozen"):
        config.router.port = 1


WRONG_VALUES: dict[str, tuple[Edit, str]] = {
    "an unknown key suggests the nearest one": (
        lambda raw: shape(raw).update(cout=2),
        "models[0].shapes[0].cout: unknown key; did you mean count?",
    ),
    "an unknown key unlike any other lists the known ones": (
        lambda raw: model(raw)["slo"].update(zzz=1),
        "models[0].slo.zzz: unknown key; known: ttft_ms, tpot_ms",
    ),
    "a missing key is named with its meaning": (
        lambda raw: model(raw)["slo"].pop("ttft_ms"),
        "models[0].slo.ttft_ms: is missing; add it: Time to first token, in milliseconds",
    ),
    "a missing section is named": (
        lambda raw: raw.pop("models"),
        "models: is missing; add it: The served models: exactly one",
    ),
    "a number in quotes is not a number": (
        lambda raw: shape(raw).update(count="2"),
        "models[0].shapes[0].count: must be a whole number, not '2'",
    ),
    "a fraction is not a count": (
        lambda raw: shape(raw).update(count=1.5),
        "models[0].shapes[0].count: must be a whole number, not 1.5",
    ),
    "true is not a count": (
        lambda raw: shape(raw).update(count=True),
        "models[0].shapes[0].count: must be a whole number, not true",
    ),
    "text is not a number": (
        lambda raw: model(raw)["slo"].update(ttft_ms="fast"),
        "models[0].slo.ttft_ms: must be a number, not 'fast'",
    ),
    "infinity is not a target": (
        lambda raw: model(raw)["slo"].update(ttft_ms=float("inf")),
        "models[0].slo.ttft_ms: must be a finite number, not inf",
    ),
    "a target must be positive": (
        lambda raw: model(raw)["slo"].update(tpot_ms=0),
        "models[0].slo.tpot_ms: must be greater than 0, not 0",
    ),
    "a port has a range": (
        lambda raw: raw.update(router={"port": 70000}),
        "router.port: must be at most 65535, not 70000",
    ),
    "there is at least one router": (
        lambda raw: raw.update(router={"replicas": 0}),
        "router.replicas: must be at least 1, not 0",
    ),
    "yes is not a boolean": (
        lambda raw: raw.update(router={"haproxy": "yes"}),
        "router.haproxy: must be true or false, not 'yes'",
    ),
    "an environment variable is text": (
        lambda raw: shape(raw).update(env={"OMP_NUM_THREADS": 1}),
        "models[0].shapes[0].env.OMP_NUM_THREADS: must be text, not 1; put it in quotes",
    ),
    "a name is not empty": (lambda raw: model(raw).update(name=""), "models[0].name: must not be empty"),
    "a shape's name fits a metric label": (
        lambda raw: shape(raw).update(name="H100_TP1"),
        "models[0].shapes[0].name: must be lower-case letters, digits and inner hyphens, not 'H100_TP1'",
    ),
    "a role is one of two": (
        lambda raw: shape(raw).update(roles=["prefil"]),
        "models[0].shapes[0].roles[0]: must be 'prefill' or 'decode', not 'prefil'",
    ),
    "an engine is one of two": (
        lambda raw: shape(raw).update(engine="sglang"),
        "models[0].shapes[0].engine: must be 'vllm' or 'mock', not 'sglang'",
    ),
    "a section is a mapping": (
        lambda raw: shape(raw).update(initial=2),
        "models[0].shapes[0].initial: must be a section with the keys prefill, decode, not 2",
    ),
    "a list is a list": (
        lambda raw: model(raw).update(shapes={"cpu": {}}),
        "models[0].shapes: must be a list, not a mapping",
    ),
    "engine arguments are a mapping": (
        lambda raw: shape(raw).update(engine_args=["--enforce-eager"]),
        "models[0].shapes[0].engine_args: must be a mapping, not a list",
    ),
    "the planner has three modes": (
        lambda raw: raw.update(planner={"mode": "on"}),
        "planner.mode: must be 'off', 'advise' or 'auto', not 'on'",
    ),
    "the planner would go by what is always stale": (
        lambda raw: raw.update(planner={"mode": "auto"}, registry={"heartbeat_s": 4.0}),
        "planner.stale_after_s: is 5, but workers speak every 4 s (registry.heartbeat_s); give it at least 8",
    ),
    "the budget does not hold the workers there are": (
        lambda raw: raw.update(planner={"mode": "advise", "gpu_budget": 1}),
        "planner.gpu_budget: is 1, but the shapes hold at least 2; raise it or lower their counts",
    ),
    "a lease is in whole seconds": (
        lambda raw: raw["kv_transfer"].update(lease_s=0),
        "kv_transfer.lease_s: must be at least 1, not 0",
    ),
}


@pytest.mark.parametrize(("edit", "problem"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_value(edit: Edit, problem: str) -> None:
    assert problems_of(edited(edit)) == [problem]


WRONG_COMBINATIONS: dict[str, tuple[Edit, str]] = {
    "there is one model": (
        lambda raw: raw["models"].append(model(raw)),
        "models: must list exactly one model, not 2; run one cluster per model",
    ),
    "the list of models is not empty": (
        lambda raw: raw.update(models=[]),
        "models: must list exactly one model, not 0; run one cluster per model",
    ),
    "shape names are unique": (
        lambda raw: add_shape(raw, name="cpu"),
        "models[0].shapes: two shapes are named 'cpu'; give each its own name",
    ),
    "adapters are not named like the model": (
        lambda raw: model(raw).update(adapters=[{"name": "demo", "path": "org/lora"}]),
        "models[0].adapters: the name 'demo' is used twice; every model and adapter needs its own",
    ),
    "someone decodes": (
        lambda raw: shape(raw).update(roles=["prefill"], initial={"prefill": 2}),
        "models[0].shapes: no worker starts as a decode worker; set initial.decode of a shape",
    ),
    "a model without shapes has nobody to decode": (
        lambda raw: model(raw).update(shapes=[]),
        "models[0].shapes: no worker starts as a decode worker; set initial.decode of a shape",
    ),
    "initial roles add up to the count": (
        lambda raw: shape(raw).update(count=3),
        "models[0].shapes[0].initial: prefill 1 + decode 1 is not 3, the count; make them equal",
    ),
    "initial roles are allowed roles": (
        lambda raw: shape(raw).update(roles=["decode"]),
        "models[0].shapes[0].initial.prefill: is 1, but roles lacks prefill; add it or set 0",
    ),
    "the least count is not above the count": (
        lambda raw: shape(raw).update(min_count=3),
        "models[0].shapes[0].min_count: is 3, more than the count, 2; lower it",
    ),
    "the least count is checked with a planner too": (
        lambda raw: (shape(raw).update(min_count=3), raw.update(planner={"mode": "auto"})),
        "models[0].shapes[0].min_count: is 3, more than the count, 2; lower it",
    ),
    "the greatest count is not below the count": (
        lambda raw: shape(raw).update(max_count=1),
        "models[0].shapes[0].max_count: is 1, less than the count, 2; raise it",
    ),
    "somebody who may decode is always there": (
        lambda raw: (
            shape(raw).update(min_count=0),
            add_shape(raw, name="more", min_count=2, roles=["prefill"], initial={"prefill": 2}),
        ),
        "models[0].shapes[0].min_count: is 0, and no other shape that may decode always has a worker; "
        "set it to 1, or the min_count of such a shape",
    ),
    "roles are not empty": (
        lambda raw: shape(raw).update(roles=[]),
        "models[0].shapes[0].roles: is empty; list prefill, decode or both",
    ),
    "a role is listed once": (
        lambda raw: shape(raw).update(roles=["prefill", "decode", "decode"]),
        "models[0].shapes[0].roles: lists decode twice",
    ),
    "CPU workers have a CPU buffer": (
        lambda raw: raw.pop("kv_transfer"),
        "models[0].shapes[0].gpus_per_worker: is 0, but kv_transfer.buffer_device is 'cuda'; "
        "CPU workers need buffer_device: cpu",
    ),
    "GPUs match the tensor parallel size": (
        lambda raw: on_gpus(raw, 2, 4),
        "models[0].shapes[0].gpus_per_worker: is 2, but engine_args.tensor_parallel_size is 4; "
        "one GPU per tensor parallel rank",
    ),
    "a share of a GPU runs one rank": (
        lambda raw: on_gpus(raw, 0.5, 2),
        "models[0].shapes[0].gpus_per_worker: is 0.5, but engine_args.tensor_parallel_size is 2; "
        "one GPU per tensor parallel rank",
    ),
    "several GPUs come whole": (
        lambda raw: on_gpus(raw, 1.5, 2),
        "models[0].shapes[0].gpus_per_worker: must be a whole number, 0, or a share under 1, not 1.5",
    ),
    "the tensor parallel size is a number": (
        lambda raw: shape(raw)["engine_args"].update(tensor_parallel_size="2"),
        "models[0].shapes[0].engine_args.tensor_parallel_size: must be a whole number of at least 1, not '2'",
    ),
    "an unknown engine argument suggests the nearest one": (
        lambda raw: shape(raw)["engine_args"].update({"enforce-eagre": True}),
        "models[0].shapes[0].engine_args.enforce-eagre: unknown to vLLM; did you mean enforce_eager?",
    ),
    "every shape fits every request": (
        lambda raw: add_shape(raw, engine_args={"max_model_len": 8192}),
        "models[0].shapes: engine_args.max_model_len differs; give every shape the same",
    ),
    "the side channel's port is Baton's": (
        lambda raw: shape(raw).update(env={"VLLM_NIXL_SIDE_CHANNEL_PORT": "5600"}),
        "models[0].shapes[0].env.VLLM_NIXL_SIDE_CHANNEL_PORT: is chosen by Baton for each engine; remove it",
    ),
    "mock settings need the mock engine": (
        lambda raw: shape(raw).update(mock={}),
        "models[0].shapes[0].mock: only has a meaning with engine: mock; remove it",
    ),
    "the mock engine takes no GPU": (
        lambda raw: as_mock(raw, gpus_per_worker=1),
        "models[0].shapes[0].gpus_per_worker: must be 0 with engine: mock, which uses no GPU",
    ),
    "the mock engine takes no engine arguments": (
        lambda raw: as_mock(raw, engine_args={"enforce_eager": True}),
        "models[0].shapes[0].engine_args: are vLLM's and have no effect with engine: mock; remove them",
    ),
    "front-end arguments begin with an option": (
        lambda raw: raw.update(router={"vllm_args": ["hermes"]}),
        "router.vllm_args[0]: must be an option such as --tool-call-parser, not 'hermes'",
    ),
    "front-end arguments do not repeat Baton's keys": (
        lambda raw: raw.update(router={"vllm_args": ["--enable-auto-tool-choice", "--port=80"]}),
        "router.vllm_args[1]: --port is refused: set router.port",
    ),
    "front-end arguments do not repeat engine arguments": (
        lambda raw: raw.update(router={"vllm_args": ["--max-model-len", "8"]}),
        "router.vllm_args[0]: --max-model-len is in engine_args too, which hold here; remove it",
    ),
    "connector parameters do not repeat Baton's keys": (
        lambda raw: raw["kv_transfer"].update(backend_params={"kv_lease_duration": 5}),
        "kv_transfer.backend_params.kv_lease_duration: is refused: set kv_transfer.lease_s",
    ),
    "a running cluster has the cores it has": (
        lambda raw: raw.update(ray={"address": "auto", "num_cpus": 4}),
        "ray.num_cpus: has no effect on a running cluster; remove it or remove ray.address",
    ),
}


@pytest.mark.parametrize(("edit", "problem"), WRONG_COMBINATIONS.values(), ids=WRONG_COMBINATIONS)
def test_wrong_combination(edit: Edit, problem: str) -> None:
    assert problems_of(edited(edit)) == [problem]


@pytest.mark.parametrize("name", ENGINE_ARGS_SET_BY_BATON)
def test_an_engine_argument_that_baton_sets_is_refused(name: str) -> None:
    (problem,) = problems_of(edited(lambda raw: shape(raw)["engine_args"].update({name: "x"})))
    assert problem == f"models[0].shapes[0].engine_args.{name}: is refused: {ENGINE_ARGS_SET_BY_BATON[name]}"


@pytest.mark.parametrize("name", ENGINE_ARGS_FIXED_AT_1)
def test_an_engine_argument_that_must_be_1_is_refused_above_it(name: str) -> None:
    (problem,) = problems_of(edited(lambda raw: shape(raw)["engine_args"].update({name: 2})))
    assert problem.startswith(f"models[0].shapes[0].engine_args.{name}: must be 1: ")
    parse_config(edited(lambda raw: shape(raw)["engine_args"].update({name: 1})))


ACCEPTED: dict[str, Edit] = {
    "tensor parallelism on CPU": lambda raw: shape(raw)["engine_args"].update(tensor_parallel_size=2),
    "tensor parallelism on as many GPUs": lambda raw: on_gpus(raw, 4, 4),
    "workers that share a GPU": lambda raw: on_gpus(raw, 0.5, 1),
    "decode workers only": lambda raw: shape(raw).update(roles=["decode"], initial={"decode": 2}),
    "a mock engine beside the CUDA buffer": lambda raw: (as_mock(raw), raw.pop("kv_transfer")),
    "a mock engine with its own timing": lambda raw: as_mock(raw, mock={"decode_step_ms": 0}),
    "two shapes": add_shape,
    "front-end arguments": lambda raw: raw.update(router={"vllm_args": ["--tool-call-parser", "hermes"]}),
    "NIXL parameters": lambda raw: raw["kv_transfer"].update(backend_params={"num_threads": 8}),
}


@pytest.mark.parametrize("edit", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(edit: Edit) -> None:
    assert isinstance(parse_config(edited(edit)), BatonConfig)


def test_all_wrong_keys_are_reported_at_once() -> None:
    raw = edited(lambda raw: (shape(raw).update(cout=1), raw.update(colour="red"), model(raw).pop("slo")))
    assert sorted(problem.split(":")[0] for problem in problems_of(raw)) == [
        "colour",
        "models[0].shapes[0].cout",
        "models[0].slo",
    ]


def test_a_local_path_becomes_absolute_and_a_hub_id_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        ("models/tiny", str(tmp_path / "models" / "tiny")),
        ("./absent", str(tmp_path / "absent")),
        ("org/model", "org/model"),
    ):
        config = parse_config(edited(lambda raw, given=given: model(raw).update(path=given)))
        assert config.models[0].path == expected


def test_missing_local_files_are_reported_at_once(tmp_path: Path) -> None:
    def edit(raw: dict[str, Any]) -> None:
        model(raw).update(path=str(tmp_path), adapters=[{"name": "a", "path": str(tmp_path / "lora")}])
        raw["router"] = {"chat_template": "./absent.jinja"}

    with pytest.raises(ConfigError) as caught:
        require_local_files(parse_config(edited(edit)))
    assert str(caught.value).splitlines() == [
        f"models[0].path: {tmp_path} is not a directory with a config.json",
        f"models[0].adapters[0].path: {tmp_path / 'lora'} is not a directory with a adapter_config.json",
        f"router.chat_template: {Path.cwd() / 'absent.jinja'} is not a file",
    ]


def test_hub_ids_and_local_files_that_exist_are_fine(tmp_path: Path) -> None:
    require_local_files(parse_config(VALID))
    (tmp_path / "config.json").touch()
    require_local_files(parse_config(edited(lambda raw: model(raw).update(path=str(tmp_path)))))


def test_the_names_of_vllms_engine_arguments_are_known_without_importing_vllm() -> None:
    names = vllm_engine_arg_names()
    assert {"max_model_len", "tensor_parallel_size", "enforce_eager", "enable_log_requests"} <= names
    assert names >= ENGINE_ARGS_SET_BY_BATON.keys() | ENGINE_ARGS_FIXED_AT_1.keys()


def test_admission_as_configured_by_default_is_admission_as_built_by_default() -> None:
    assert admission_limits(AdmissionConfig()) == AdmissionLimits()
    assert admission_limits(AdmissionConfig(enabled=False)) is None
    limits = admission_limits(AdmissionConfig(max_wait_s=7.0, tenant_weights={"a": 2.0}))
    assert limits == AdmissionLimits(max_wait_s=7.0, tenant_weights={"a": 2.0})


def test_a_profile_that_is_not_there_is_said_before_anything_starts() -> None:
    raw = copy.deepcopy(VALID)
    raw["models"][0]["shapes"][0]["profile"] = "nowhere.json"
    problem = r"models\[0\].shapes\[0\].profile: there is no profile 'nowhere.json'"
    with pytest.raises(ConfigError, match=problem):
        require_local_files(parse_config(raw))
