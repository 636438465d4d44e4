"""vLLM's OpenAI application in front of the relay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.config import VllmConfig

from engine.vllm_args import engine_arguments
from router.body_errors import answer_stumbles
from router.engine_client import RelayEngineClient
from router.engineless_client import SUPPORTED_TASKS
from router.refusal_logs import leave_refusals_out
from router.request_context import Refusal, RequestContext, enter_request

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
    answer_stumbles(app)
    leave_refusals_out()
    await init_app_state(client, app.state, args, SUPPORTED_TASKS)
    return app


class FrontDoor:
    """ASGI middleware: reads the request's headers, and holds an answer's head back until its first byte.

    A streamed answer's status would otherwise be sent before anyone knows whether there is an answer: a
    request that is turned away, or that nobody could take, gets its status and when to come back.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            request = enter_request(scope["headers"])
        except ValueError as error:
            await _error(Refusal(status=400, message=str(error)))(scope, receive, send)
            return
        await self._app(scope, receive, _HeldHead(request, scope, receive, send))


class _HeldHead:
    """The ``send`` of one request."""

    def __init__(self, request: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        self._request = request
        self._scope, self._receive, self._send = scope, receive, send
        self._head: Message | None = None
        self._refused = False

    async def __call__(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self._head = message
            return
        if self._head is not None:
            head, self._head = self._head, None
            refusal = self._request.refusal
            if refusal is not None and head["status"] in (HTTPStatus.OK, refusal.status):
                self._refused = True
                await _error(refusal)(self._scope, self._receive, self._send)
                return
            if head["status"] in _BUSY:
                head["headers"] = [*head["headers"], (b"retry-after", str(RETRY_AFTER_S).encode())]
            await self._send(head)
        await self._send(message)


def _error(refusal: Refusal) -> JSONResponse:
    """In the form of OpenAI's errors."""
    kind = HTTPStatus(refusal.status).phrase.title().replace(" ", "")
    headers = {}
    if refusal.status in _BUSY:
        headers["retry-after"] = str(math.ceil(refusal.retry_after_s or RETRY_AFTER_S))
    return JSONResponse(
        {"error": {"message": refusal.message, "type": kind, "param": None, "code": refusal.status}},
        status_code=refusal.status,
        headers=headers,
    )
