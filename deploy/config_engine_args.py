"""vLLM's own arguments: which exist, and which are refused because Baton sets them."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

ENGINE_ARGS_SET_BY_BATON = {
    "model": "set models[].path",
    "served_model_name": "set models[].name",
    "revision": "set models[].revision",
    "kv_transfer_config": "set the section kv_transfer",
    "kv_events_config": "Baton wires KV events itself",
    "enable_lora": "list the adapters in models[].adapters",
    "worker_extension_cls": "Baton's own extension frees and renews KV",
    "disable_log_stats": "Baton's metrics need the statistics",
    "enable_log_requests": "Baton logs requests itself",
}
"""Engine arguments that are refused, and what to do instead."""

ENGINE_ARGS_FIXED_AT_1 = {
    "pipeline_parallel_size": "KV handoff does not support pipeline parallelism; use tensor_parallel_size",
    "data_parallel_size": "raise the shape's count instead",
}
"""Engine arguments that may only be 1, and why."""

ENV_SET_BY_BATON = ("VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT")
"""Environment variables that Baton chooses for each engine."""

VLLM_ARGS_SET_BY_BATON = {
    "--model": "set models[].path",
    "--served-model-name": "set models[].name",
    "--revision": "set models[].revision",
    "--lora-modules": "list the adapters in models[].adapters",
    "--enable-lora": "list the adapters in models[].adapters",
    "--chat-template": "set router.chat_template",
    "--host": "set router.host",
    "--port": "set router.port",
    "--uds": "set router.host and router.port",
    "--api-server-count": "set router.replicas",
    "--kv-transfer-config": "set the section kv_transfer",
    "--ssl-keyfile": "Ray Serve owns the HTTP server; end TLS in front of it",
    "--ssl-certfile": "Ray Serve owns the HTTP server; end TLS in front of it",
    "--ssl-ca-certs": "Ray Serve owns the HTTP server; end TLS in front of it",
    "--uvicorn-log-level": "Ray Serve owns the HTTP server",
    "--disable-uvicorn-access-log": "Ray Serve owns the HTTP server",
    "--config": "write the arguments out",
}
"""Arguments of vLLM's front end that are refused, and what to do instead."""

CONNECTOR_PARAMS_SET_BY_BATON = {
    "backends": "set kv_transfer.backend",
    "kv_lease_duration": "set kv_transfer.lease_s",
    "bidirectional_kv_xfer": "KV only travels from prefill to decode",
}
"""Entries of kv_connector_extra_config that are refused, and what to do instead."""


@cache
def vllm_engine_arg_names() -> frozenset[str]:
    """Field names of vLLM's AsyncEngineArgs, empty where vLLM is not installed.

    Read from the source text, because importing vLLM takes longer than everything else a
    configuration check does.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    module = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    return frozenset(
        statement.target.id
        for definition in module.body
        if isinstance(definition, ast.ClassDef) and definition.name in ("EngineArgs", "AsyncEngineArgs")
        for statement in definition.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )
