"""The part of vLLM's EngineClient that a front end without an engine answers by itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import PoolingRequestOutput
from vllm.tasks import SupportedTask

from core.errors import WorkerLost

SUPPORTED_TASKS: tuple[SupportedTask, ...] = ("generate",)


class EnginelessClient(EngineClient):
    """Healthy while its process is; refuses what acts on a single engine."""

    # What the OpenAI application asks beside generating.

    @property
    def is_running(self) -> bool:
        return True

    @property
    def is_stopped(self) -> bool:
        return False

    @property
    def errored(self) -> bool:
        return False

    @property
    def dead_error(self) -> BaseException:
        return WorkerLost("the router is stopping")

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return SUPPORTED_TASKS

    async def check_health(self) -> None:
        return None

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None:
        return None

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        return True  # workers load adapters when a request first names them

    async def reset_mm_cache(self) -> None:
        return None

    async def is_sleeping(self) -> bool:
        return False

    async def is_paused(self) -> bool:
        return False

    async def notify_kv_transfer_request_rejected(
        self,
        request_id: str,
        kv_transfer_params: dict[str, Any],
        *,
        data_parallel_rank: int | None = None,
    ) -> None:
        return None  # clients' KV fields are never used, so nothing is pinned for them

    # What a router cannot do: these act on one engine.

    def encode(self, *args: Any, **kwargs: Any) -> AsyncGenerator[PoolingRequestOutput, None]:
        raise VLLMValidationError("This cluster serves generation only.")

    async def start_profile(self, *args: Any, **kwargs: Any) -> None:
        raise _not_here()

    async def stop_profile(self) -> None:
        raise _not_here()

    async def reset_encoder_cache(self) -> None:
        raise _not_here()

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        raise _not_here()

    async def sleep(self, *args: Any, **kwargs: Any) -> None:
        raise _not_here()

    async def release_kv_cache_memory(self) -> None:
        raise _not_here()

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        raise _not_here()

    async def pause_generation(self, *args: Any, **kwargs: Any) -> None:
        raise _not_here()

    async def resume_generation(self) -> None:
        raise _not_here()


def _not_here() -> GracefulHTTPError:
    return GracefulHTTPError(
        "This acts on a single engine; the router stands before many.", HTTPStatus.NOT_IMPLEMENTED
    )
