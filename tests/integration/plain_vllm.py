"""Plain vLLM, the reference: its own OpenAI server with one engine and no KV connector.

Run as a program, it is that server, and it ends when its standard input closes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from deploy.config_schema import BatonConfig
from deploy.environment import worker_environment
from tests.integration.server_process import HOST, ServerProcess


def start_plain_vllm(config: BatonConfig, port: int, log: Path) -> ServerProcess:
    """One engine as the workers of ``config`` have it, behind vLLM's own front end with the same flags."""
    (model,), router = config.models, config.router
    command = [sys.executable, "-m", "tests.integration.plain_vllm"]
    command += ["--model", model.path, "--served-model-name", model.name]
    command += ["--host", HOST, "--port", str(port), "--disable-uvicorn-access-log"]
    for name, value in model.shapes[0].engine_args.items():
        command += _option(name, value)
    if model.adapters:
        modules = [f"{adapter.name}={adapter.path}" for adapter in model.adapters]
        command += ["--enable-lora", "--lora-modules", *modules]
    environment = worker_environment(model.shapes[0])
    return ServerProcess("plain vLLM", [*command, *router.vllm_args], environment, log)


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    threading.Thread(target=_end_with_input, daemon=True).start()
    serve()


if __name__ == "__main__":
    main()
