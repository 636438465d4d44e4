"""vLLM's EngineClient over the relay: what lets vLLM's own OpenAI application run without an engine.

Requests are validated and tokenized by vLLM's input processor and detokenized by vLLM's output
processor, exactly as in front of a local engine; only the engine in between is the cluster.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from copy import copy
from http import HTTPStatus
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from core.clock import Clock
from core.errors import NoWorkerAvailable, Rejected, WorkerLost
from engine.base import EngineDelta
from engine.vllm_codec import encode_options
from router.core_output import core_output
from router.disaggregation import choose_path
from router.engineless_client import SUPPORTED_TASKS, EnginelessClient
from router.relay import Relay
from router.relay_request import RelayRequest
from router.request_context import Refusal, current_request
from router.sampling import facts_of
from router.trace import RequestTrace
from router.tracker import RequestTracker
from telemetry.logs import fields
from telemetry.slo import SloTargets

logger = logging.getLogger(__name__)


class RelayEngineClient(EnginelessClient):
    """One per router replica.

    Args:
        router_id: this router start; request ids begin with it.
        slo: targets of requests that bring none of their own.
        explain_all: note of every request what its decisions were made from.
        tracker: told what happens to each request.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: str,
        relay: Relay,
        tracker: RequestTracker,
        clock: Clock,
        router_id: str,
        slo: SloTargets,
        *,
        explain_all: bool = False,
    ) -> None:
        self._explain_all = explain_all
        self._slo = slo
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self._output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self._model = model
        self._relay = relay
        self._tracker = tracker
        self._clock = clock
        self._router_id = router_id
        self._counter = itertools.count()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Called by vLLM before it begins a response: the last moment for an HTTP status.

        Raises:
            GracefulHTTPError: 503, no worker could take the request.
        """
        try:
            self._relay.check_available(self._model)
        except NoWorkerAvailable as error:
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from error

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        request = self.input_processor.process_inputs(
            request_id,
            prompt,
            _without_kv_fields(sampling_params),
            supported_tasks=SUPPORTED_TASKS,
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
            trace_headers=trace_headers,
            priority=priority,
            data_parallel_rank=data_parallel_rank,
            session_id=session_id,
            kv_hints=kv_hints,
        )
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.mm_features:
            raise VLLMValidationError("Only token prompts are served: no embeddings, images, audio or video.")
        request.reasoning_ended = reasoning_ended
        request.reasoning_parser_kwargs = reasoning_parser_kwargs
        self.input_processor.assign_request_id(request)
        if prompt_text is None and isinstance(prompt, dict):
            prompt_text = prompt.get("prompt")
        queue = RequestOutputCollector(request.params.output_kind, request.request_id)
        children = self._start(request, prompt_text, queue)
        finished = False
        try:
            while not finished:
                output = queue.get_nowait() or await queue.get()
                finished = output.finished
                yield output
        except WorkerLost as error:
            raise _refuse(HTTPStatus.BAD_GATEWAY, error) from error
        except NoWorkerAvailable as error:
            raise _refuse(HTTPStatus.SERVICE_UNAVAILABLE, error, error.retry_after_s) from error
        except Rejected as error:
            raise _refuse(HTTPStatus(error.status), error, error.retry_after_s) from error
        finally:
            queue.close()
            if not finished:
                self._cancel(children)

    def _start(
        self, request: EngineCoreRequest, prompt_text: str | None, queue: RequestOutputCollector
    ) -> list[str]:
        """Registers the request with the output processor and starts one relay per sequence."""
        params = request.params
        if params.n == 1:
            siblings = [(request, None, 0)]
        else:
            parent = ParentRequest(request)
            siblings = []
            for index in range(params.n):
                child = copy(request)
                child.request_id, child.sampling_params = parent.get_child_info(index)
                siblings.append((child, parent, index))
        for child, parent, index in siblings:
            self._output_processor.add_request(child, prompt_text, parent, index, queue)
        for child, _, _ in siblings:
            task = asyncio.create_task(self._run(child, params.n, queue), name=f"relay {child.request_id}")
            self._tasks[child.request_id] = task
        return [child.request_id for child, _, _ in siblings]

    async def _run(
        self, request: EngineCoreRequest, num_siblings: int, queue: RequestOutputCollector
    ) -> None:
        relay_request, trace = self._described(request, num_siblings)
        tracked = self._tracker.begin(trace)
        core_id = request.request_id

        def emit(delta: EngineDelta) -> None:
            tracked.on_delta(delta)
            processed = self._output_processor.process_outputs([core_output(core_id, delta)])
            if processed.reqs_to_abort:  # a stop string: the text is complete, the engine does not know
                tracked.stopped = True
                self._tasks[core_id].cancel()

        try:
            await self._relay.run(relay_request, trace, emit)
            tracked.end("completed")
        except asyncio.CancelledError:
            tracked.end("completed" if tracked.stopped else "cancelled")
            if not tracked.stopped:
                # Whoever still waits for an answer must not wait for ever.
                self._fail(core_id, WorkerLost("the request was cancelled"), queue)
                raise
        except Rejected as error:
            self._tracker.refused(error.reason)
            tracked.end("rejected")
            self._fail(core_id, error, queue)
        except (WorkerLost, NoWorkerAvailable) as error:
            tracked.end("failed")
            self._fail(core_id, error, queue)
        except ValueError as error:
            tracked.end("invalid")
            self._fail(core_id, VLLMValidationError(str(error)), queue)
        except Exception as error:
            logger.exception("relay failed", extra=fields(request_id=trace.request_id))
            tracked.end("failed")
            self._fail(core_id, error, queue)
        finally:
            self._tasks.pop(core_id, None)

    def _described(self, request: EngineCoreRequest, num_siblings: int) -> tuple[RelayRequest, RequestTrace]:
        """A sequence as the relay takes it, and the trace that goes with it."""
        adapter = request.lora_request.lora_name if request.lora_request else ""
        params, context = request.params, current_request()
        facts = facts_of(params, num_siblings, own_processors=bool(self.model_config.logits_processors))
        slo = SloTargets(
            ttft_s=context.ttft_slo_s or self._slo.ttft_s, tpot_s=context.tpot_slo_s or self._slo.tpot_s
        )
        trace = RequestTrace(
            request_id=request.external_req_id or request.request_id,
            model=self._model,
            adapter=adapter,
            tenant=context.tenant,
            prompt_tokens=len(request.prompt_token_ids),
            received_at_s=self._clock.now_s(),
            path=choose_path(facts),
            slo=slo,
        )
        relay_request = RelayRequest(
            request_id=f"{self._router_id}.{next(self._counter)}",
            model=self._model,
            adapter=adapter,
            tenant=trace.tenant,
            prompt_token_ids=request.prompt_token_ids,
            params=params,
            options=encode_options(
                lora=request.lora_request,
                cache_salt=request.cache_salt,
                reasoning_ended=request.reasoning_ended,
                reasoning_parser_kwargs=request.reasoning_parser_kwargs,
            ),
            path=trace.path,
            depends_on_output_history=facts.depends_on_output_history,
            priority=request.priority,
            cache_salt=request.cache_salt or "",
            session=request.session_id or "",
            owner=context.owner,
            ttft_slo_s=slo.ttft_s,
            tpot_slo_s=slo.tpot_s,
            explain=context.explain or self._explain_all,
            trace_headers=dict(request.trace_headers or {}),
        )
        return relay_request, trace

    def _fail(self, core_id: str, error: Exception, queue: RequestOutputCollector) -> None:
        self._output_processor.abort_requests([core_id], internal=True)
        queue.put(error)

    def _cancel(self, core_ids: Iterable[str]) -> None:
        """Drops sequences that have not ended; those that have are not known any more."""
        for core_id in core_ids:
            task = self._tasks.pop(core_id, None)
            if task is not None:
                task.cancel()
        self._output_processor.abort_requests(
            [core_id for core_id in core_ids if self._output_processor.has_request(core_id)], internal=True
        )

    def explain(self, prompt: str) -> dict[str, Any]:
        """What would be decided for a chat message or text of this many tokens now, and why; nothing is sent.

        Raises:
            NoWorkerAvailable: no worker can take it now.
            ValueError: the prompt is longer than the model takes.
        """
        token_ids = self.renderer.get_tokenizer().encode(prompt)
        params = SamplingParams(max_tokens=2)
        request = self.input_processor.process_inputs(
            "explain",
            {"type": "token", "prompt_token_ids": token_ids},
            params,
            supported_tasks=SUPPORTED_TASKS,
        )
        return self._relay.explain(*self._described(request, num_siblings=1))

    async def abort(self, request_id: str | Iterable[str]) -> None:
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        for core_id in self._output_processor.abort_requests(request_ids, internal=False):
            task = self._tasks.pop(core_id, None)
            if task is not None:
                task.cancel()

    def shutdown(self, timeout: float | None = None) -> None:
        self._cancel(list(self._tasks))


def _refuse(status: HTTPStatus, error: Exception, retry_after_s: float | None = None) -> GracefulHTTPError:
    """For an answer that has not begun, and in the way that vLLM tells of it in one that has."""
    current_request().refusal = Refusal(status=status, message=str(error), retry_after_s=retry_after_s)
    return GracefulHTTPError(str(error), status)


def _without_kv_fields(params: SamplingParams) -> SamplingParams:
    """KV fields steer where an engine reads memory from: only the relay may set them."""
    if not params.extra_args or "kv_transfer_params" not in params.extra_args:
        return params
    params = params.clone()
    rest = {key: value for key, value in params.extra_args.items() if key != "kv_transfer_params"}
    params.extra_args = rest or None
    return params
