"""vLLM's OpenAI application in front of the relay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.config import VllmConfig

from engine.vllm_args import engine_arguments
from router.engine_client import RelayEngineClient
from router.engineless_client import SUPPORTED_TASKS
from router.tenant import TENANT_HEADER, set_tenant

RETRY_AFTER_S = 1
_BUSY = (429, 503)


def parse_front_end_args(
    *,
    model_path: str,
    served_name: str,
    revision: str | None,
    engine_args: dict[str, Any],
    adapters: dict[str, str],
    extra: Sequence[str],
) -> Any:
    """vLLM's own argument namespace for its API server.

    Args:
        engine_args: as the workers get them; what the front end needs of them (length limits,
            parsers, dtype) must be the same on both sides.
        adapters: LoRA adapters by name.
        extra: further arguments of vLLM's ``serve`` command.

    Raises:
        ValueError: vLLM does not know an argument or refuses its value.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = ["--model", model_path, "--served-model-name", served_name]
    if revision:
        arguments += ["--revision", revision]
    if adapters:
        arguments += ["--enable-lora", "--lora-modules", *(f"{n}={p}" for n, p in adapters.items())]
    parser = make_arg_parser(FlexibleArgumentParser())
    try:
        args = parser.parse_args([*arguments, *extra])
        validate_parsed_serve_args(args)
    except SystemExit as error:
        raise ValueError(f"router.vllm_args: vLLM refuses {' '.join(extra)}") from error
    for name, value in engine_arguments(engine_args).items():
        setattr(args, name, value)
    # Only the workers have an engine and devices.
    args.tensor_parallel_size = 1
    args.disable_log_stats = True
    args.enable_log_requests = False
    return args


def front_end_config(args: Any) -> VllmConfig:
    """The configuration as the front end needs it: a model and its limits, but no device and no cache."""
    from vllm.config import LoRAConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    model_config.quantization = None  # weights are the workers' business
    return VllmConfig(
        model_config=model_config,
        lora_config=LoRAConfig() if args.enable_lora else None,
        structured_outputs_config=engine_args.create_structured_outputs_config(),
        reasoning_config=_reasoning_config(engine_args),
    )


def _reasoning_config(engine_args: Any) -> Any:
    """What a request's thinking budget is checked against; as AsyncEngineArgs makes it for an engine."""
    from vllm.config import ReasoningConfig

    if not engine_args.reasoning_parser:
        return engine_args.reasoning_config
    config = engine_args.reasoning_config or ReasoningConfig()
    config.reasoning_parser = engine_args.reasoning_parser
    return config


async def build_openai_app(client: RelayEngineClient, args: Any) -> Any:
    """The FastAPI application, ready to serve."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    app = build_app(args, SUPPORTED_TASKS, client.model_config)
    await init_app_state(client, app.state, args, SUPPORTED_TASKS)
    return app


class FrontDoor:
    """ASGI middleware: who the tenant is, and when to come back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        for name, value in scope["headers"]:
            if name == TENANT_HEADER:
                set_tenant(value)

        async def send_with_retry_after(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in _BUSY:
                message["headers"] = [
                    *message["headers"],
                    (b"retry-after", str(RETRY_AFTER_S).encode()),
                ]
            await send(message)

        await self._app(scope, receive, send_with_retry_after)
