"""What travels through the relay: a request, and a finished prefill on its way to a decode worker."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm.sampling_params import SamplingParams

from baton_proto import worker_pb2
from baton_proto.codecs import pack_tokens
from core.prompt_blocks import PromptBlocks, root_state
from core.request import Path
from engine.base import EngineDelta
from router.cluster_view import Member
from router.sampling import LegParams

Emit = Callable[[EngineDelta], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayRequest:
    """One sequence to relay."""

    request_id: str
    """Minted by the router, unique over all routers; attempts add a suffix."""
    model: str
    adapter: str
    tenant: str
    prompt_token_ids: list[int]
    params: SamplingParams
    options: bytes
    """msgpack of engine arguments beside the sampling parameters."""
    path: Path
    depends_on_output_history: bool = False
    """The next token depends on which tokens were generated, beyond their being in the context."""
    replay_token_ids: tuple[int, ...] = ()
    """Tokens its decode leg begins with, whatever would be sampled."""
    priority: int = 0
    cache_salt: str = ""
    session: str = ""
    """Requests of one session had better go to the same workers; empty for none."""
    owner: str = ""
    """Whose fair share it is counted on."""
    ttft_slo_s: float = math.inf
    tpot_slo_s: float = math.inf
    explain: bool = False
    """Note what its routing decisions were made from."""
    trace_headers: dict[str, str] = field(default_factory=dict)

    def blocks(self) -> PromptBlocks:
        """Its prompt as the workers' caches know it."""
        root = root_state(model=self.model, adapter=self.adapter, salt=self.cache_salt)
        return PromptBlocks(root, self.prompt_token_ids)

    def leg_message(
        self, request_id: str, leg: LegParams, prompt_token_ids: list[int]
    ) -> worker_pb2.EngineRequest:
        """This request as one leg on one worker."""
        return worker_pb2.EngineRequest(
            request_id=request_id,
            model=self.model,
            adapter=self.adapter,
            tenant=self.tenant,
            prompt_token_ids=pack_tokens(prompt_token_ids),
            max_tokens=leg.max_tokens,
            sampling_params=leg.encoded,
            options=self.options,
            priority=self.priority,
            trace_headers=self.trace_headers,
        )


@dataclass(slots=True)
class Handoff:
    """A finished prefill: what the decode leg starts from."""

    prefill: Member
    request_id: str
    kv_handle: worker_pb2.KvHandle
    cached_tokens: int
    cache_creation_tokens: int
    first_token: EngineDelta | None = None
    """The token that was sent early, None if the decode leg samples it."""
    taken: bool = False
    """True once a decode worker may have seen the handle: it is not given to another one."""

    async def release(self) -> None:
        """Frees the prompt's KV where it was computed; nobody may pull it after this."""
        await self.prefill.link.release([self.request_id])
