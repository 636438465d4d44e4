"""Combinations that no schema can refuse: each finding is one line, ``key path: what is wrong; the fix``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import ConfigError
from core.types import Role
from deploy.config_engine_args import (
    CONNECTOR_PARAMS_SET_BY_BATON,
    ENGINE_ARGS_FIXED_AT_1,
    ENGINE_ARGS_SET_BY_BATON,
    ENV_SET_BY_BATON,
    VLLM_ARGS_SET_BY_BATON,
    vllm_engine_arg_names,
)
from deploy.config_messages import suggestion
from deploy.planner_settings import planned_shape
from simulator.profiles.files import find_profile

if TYPE_CHECKING:
    from deploy.config_schema import BatonConfig, ModelConfig, RouterConfig, ShapeConfig


def find_problems(config: BatonConfig) -> Iterator[str]:
    """Everything that is wrong with a configuration whose keys and types are right."""
    if len(config.models) != 1:
        yield f"models: must list exactly one model, not {len(config.models)}; run one cluster per model"
    for index, model in enumerate(config.models):
        yield from _model_problems(f"models[{index}]", model, config.kv_transfer.buffer_device)
    yield from _router_problems(config.router, config.models)
    yield from _planner_problems(config)
    for key, fix in CONNECTOR_PARAMS_SET_BY_BATON.items():
        if key in config.kv_transfer.backend_params:
            yield f"kv_transfer.backend_params.{key}: is refused: {fix}"
    if config.ray.address is not None and config.ray.num_cpus is not None:
        yield "ray.num_cpus: has no effect on a running cluster; remove it or remove ray.address"


def require_local_files(config: BatonConfig) -> None:
    """Checks that the model, adapter, chat template and profile paths of this machine exist.

    Hub ids are not checked. Not part of ``load_config``, so that a file can be validated elsewhere.

    Raises:
        ConfigError: one line per missing path.
    """
    problems: list[str] = []
    for index, model in enumerate(config.models):
        wanted = [(f"models[{index}].path", model.path, "config.json")]
        for number, adapter in enumerate(model.adapters):
            wanted.append((f"models[{index}].adapters[{number}].path", adapter.path, "adapter_config.json"))
        for key, path, file_name in wanted:
            if path.startswith("/") and not (Path(path) / file_name).is_file():
                problems.append(f"{key}: {path} is not a directory with a {file_name}")
        for number, shape in enumerate(model.shapes):
            if shape.profile is not None:
                try:
                    find_profile(shape.profile)
                except ConfigError as error:
                    problems.append(f"models[{index}].shapes[{number}].profile: {error}")
    template = config.router.chat_template
    if template is not None and not Path(template).is_file():
        problems.append(f"router.chat_template: {template} is not a file")
    if problems:
        raise ConfigError("\n".join(problems))


def _model_problems(key: str, model: ModelConfig, buffer_device: str) -> Iterator[str]:
    served = [model.name, *(adapter.name for adapter in model.adapters)]
    for name in _duplicates(served):
        yield f"{key}.adapters: the name {name!r} is used twice; every model and adapter needs its own"
    for name in _duplicates(shape.name for shape in model.shapes):
        yield f"{key}.shapes: two shapes are named {name!r}; give each its own name"
    for index, shape in enumerate(model.shapes):
        yield from _shape_problems(f"{key}.shapes[{index}]", shape, buffer_device)
        yield from _count_problems(f"{key}.shapes[{index}]", shape, model.shapes)
    if not any(shape.initial.decode for shape in model.shapes):
        yield f"{key}.shapes: no worker starts as a decode worker; set initial.decode of a shape"
    vllm_shapes = [shape for shape in model.shapes if shape.engine == "vllm"]
    if len({shape.engine_args.get("max_model_len") for shape in vllm_shapes}) > 1:
        yield f"{key}.shapes: engine_args.max_model_len differs; give every shape the same"


def _shape_problems(key: str, shape: ShapeConfig, buffer_device: str) -> Iterator[str]:
    yield from _role_problems(key, shape)
    for name in ENV_SET_BY_BATON:
        if name in shape.env:
            yield f"{key}.env.{name}: is chosen by Baton for each engine; remove it"
    if shape.engine == "mock":
        yield from _mock_problems(key, shape)
        return
    if shape.mock is not None:
        yield f"{key}.mock: only has a meaning with engine: mock; remove it"
    if shape.gpus_per_worker == 0 and buffer_device != "cpu":
        yield (
            f"{key}.gpus_per_worker: is 0, but kv_transfer.buffer_device is {buffer_device!r}; "
            "CPU workers need buffer_device: cpu"
        )
    yield from _engine_arg_problems(key, shape)


def _role_problems(key: str, shape: ShapeConfig) -> Iterator[str]:
    if not shape.roles:
        yield f"{key}.roles: is empty; list prefill, decode or both"
    for role in _duplicates(shape.roles):
        yield f"{key}.roles: lists {role} twice"
    initial = {Role.PREFILL: shape.initial.prefill, Role.DECODE: shape.initial.decode}
    for role, num_workers in initial.items():
        if num_workers and shape.roles and role not in shape.roles:
            yield f"{key}.initial.{role}: is {num_workers}, but roles lacks {role}; add it or set 0"
    if sum(initial.values()) != shape.count:
        total = " + ".join(f"{role} {num_workers}" for role, num_workers in initial.items())
        yield f"{key}.initial: {total} is not {shape.count}, the count; make them equal"


def _count_problems(key: str, shape: ShapeConfig, shapes: Sequence[ShapeConfig]) -> Iterator[str]:
    if shape.min_count is not None and shape.min_count > shape.count:
        yield f"{key}.min_count: is {shape.min_count}, more than the count, {shape.count}; lower it"
    if shape.max_count is not None and shape.max_count < shape.count:
        yield f"{key}.max_count: is {shape.max_count}, less than the count, {shape.count}; raise it"
    others = (other for other in shapes if other is not shape)
    if shape.min_count == 0 and not any(
        Role.DECODE in other.roles and other.counts.start for other in others
    ):
        yield (
            f"{key}.min_count: is 0, and no other shape that may decode always has a worker; "
            "set it to 1, or the min_count of such a shape"
        )


def _mock_problems(key: str, shape: ShapeConfig) -> Iterator[str]:
    if shape.gpus_per_worker:
        yield f"{key}.gpus_per_worker: must be 0 with engine: mock, which uses no GPU"
    if shape.engine_args:
        yield f"{key}.engine_args: are vLLM's and have no effect with engine: mock; remove them"


def _engine_arg_problems(key: str, shape: ShapeConfig) -> Iterator[str]:
    known = vllm_engine_arg_names()
    for name in shape.engine_args:
        if name in ENGINE_ARGS_SET_BY_BATON:
            yield f"{key}.engine_args.{name}: is refused: {ENGINE_ARGS_SET_BY_BATON[name]}"
        elif known and name not in known:
            yield f"{key}.engine_args.{name}: unknown to vLLM{suggestion(name, sorted(known))}"
    for name, reason in ENGINE_ARGS_FIXED_AT_1.items():
        if shape.engine_args.get(name, 1) != 1:
            yield f"{key}.engine_args.{name}: must be 1: {reason}"
    tp_size = shape.engine_args.get("tensor_parallel_size", 1)
    num_gpus = shape.gpus_per_worker
    if type(tp_size) is not int or tp_size < 1:
        yield f"{key}.engine_args.tensor_parallel_size: must be a whole number of at least 1, not {tp_size!r}"
    elif num_gpus > 1 and num_gpus != int(num_gpus):
        yield f"{key}.gpus_per_worker: must be a whole number, 0, or a share under 1, not {num_gpus:g}"
    elif num_gpus and tp_size != max(num_gpus, 1):
        yield (
            f"{key}.gpus_per_worker: is {num_gpus:g}, but engine_args.tensor_parallel_size is {tp_size}; "
            "one GPU per tensor parallel rank"
        )


def _router_problems(router: RouterConfig, models: Sequence[ModelConfig]) -> Iterator[str]:
    engine_args = {name for model in models for shape in model.shapes for name in shape.engine_args}
    first = router.vllm_args[0] if router.vllm_args else "--"
    if not first.startswith("--"):
        yield f"router.vllm_args[0]: must be an option such as --tool-call-parser, not {first!r}"
    for index, argument in enumerate(router.vllm_args):
        option = argument.split("=", maxsplit=1)[0].replace("_", "-")
        if option in VLLM_ARGS_SET_BY_BATON:
            yield f"router.vllm_args[{index}]: {option} is refused: {VLLM_ARGS_SET_BY_BATON[option]}"
        elif option.removeprefix("--").replace("-", "_") in engine_args:
            yield f"router.vllm_args[{index}]: {option} is in engine_args too, which hold here; remove it"


def _planner_problems(config: BatonConfig) -> Iterator[str]:
    planner, heartbeat_s = config.planner, config.registry.heartbeat_s
    if planner.mode == "off":
        return
    if planner.stale_after_s < 2 * heartbeat_s:
        yield (
            f"planner.stale_after_s: is {planner.stale_after_s:g}, but workers speak every {heartbeat_s:g} s"
            f" (registry.heartbeat_s); give it at least {2 * heartbeat_s:g}"
        )
    shapes = [planned_shape(shape) for model in config.models for shape in model.shapes]
    least = sum(shape.min_workers * shape.gpus_per_worker for shape in shapes)
    if planner.gpu_budget is not None and planner.gpu_budget < least:
        yield (
            f"planner.gpu_budget: is {planner.gpu_budget:g}, but the shapes hold at least {least:g};"
            " raise it or lower their counts"
        )


def _duplicates(names: Iterable[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]
