"""Between Baton's engine interface and vLLM's own types."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from vllm.exceptions import VLLMClientError
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from engine.base import EngineDelta, EngineRequest, LogprobRows
from engine.replay import REPLAY_ARG

_OURS = ("kv_transfer_params", REPLAY_ARG)
"""Further arguments that only a worker may set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Arguments of AsyncLLM.generate beside prompt and sampling parameters."""

    prompt: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def _encode_foreign(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot send a {type(value).__name__} to a worker")


def _decode_foreign(type_: type, value: Any) -> Any:
    if type_ is np.ndarray:
        return np.asarray(value)
    raise TypeError(f"cannot decode a {type_.__name__}")


_params_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_foreign)


def encode_sampling_params(params: SamplingParams) -> bytes:
    """Every field of the parameters, private ones too."""
    return _params_encoder.encode(params)


def encode_options(
    *,
    lora: LoRARequest | None = None,
    cache_salt: str | None = None,
    reasoning_ended: bool | None = None,
    reasoning_parser_kwargs: dict[str, Any] | None = None,
) -> bytes:
    """Empty when there is nothing but defaults."""
    options: dict[str, Any] = {}
    if lora is not None:
        options["lora"] = [lora.lora_name, _adapter_id(lora), lora.lora_path]
    if cache_salt:
        options["cache_salt"] = cache_salt
    if reasoning_ended is not None:
        options["reasoning_ended"] = reasoning_ended
    if reasoning_parser_kwargs:
        options["reasoning_parser_kwargs"] = reasoning_parser_kwargs
    return _params_encoder.encode(options) if options else b""


def _adapter_id(lora: LoRARequest) -> int:
    """The same on every router and after every update: engines tell adapters apart by this number alone."""
    digest = hashlib.blake2b(f"{lora.lora_name}\0{lora.lora_path}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF or 1


class _Options(msgspec.Struct):
    """What ``encode_options`` writes."""

    lora: tuple[str, int, str] | None = None
    """Name, number and path of the adapter."""
    cache_salt: str | None = None
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: dict[str, Any] | None = None


class RequestDecoder:
    """Turns engine requests into arguments of AsyncLLM.generate.

    Args:
        vocab_size: of the model; vLLM checks the fields clients can set against it, and nothing checks
            what else comes over the wire and indexes the logits.
    """

    def __init__(self, vocab_size: int = 1 << 31) -> None:
        self._vocab_size = vocab_size
        self._params = msgspec.msgpack.Decoder(SamplingParams, dec_hook=_decode_foreign)
        self._options = msgspec.msgpack.Decoder(_Options)

    def decode(self, request: EngineRequest) -> tuple[SamplingParams, EngineOptions]:
        """
        Raises:
            ValueError: the request's parameters do not decode, or an engine cannot take them.
        """
        params = _decoded(self._params, request.sampling_params, "sampling parameters")
        options = _decoded(self._options, request.options, "options") if request.options else _Options()
        self._check(params, request)
        params.max_tokens = request.max_tokens
        params.detokenize = False
        params.output_kind = RequestOutputKind.DELTA
        params.flat_logprobs = True
        params.skip_clone = True
        extra = {k: v for k, v in (params.extra_args or {}).items() if k not in _OURS}
        if request.kv_params is not None:
            extra["kv_transfer_params"] = dict(request.kv_params)
        if request.replay_token_ids:
            extra[REPLAY_ARG] = list(request.replay_token_ids)
        params.extra_args = extra or None
        arguments: dict[str, Any] = {}
        if options.reasoning_ended is not None:
            arguments["reasoning_ended"] = options.reasoning_ended
        if options.reasoning_parser_kwargs is not None:
            arguments["reasoning_parser_kwargs"] = options.reasoning_parser_kwargs
        if options.lora is not None:
            arguments["lora_request"] = _lora(options.lora)
        prompt = {"cache_salt": options.cache_salt} if options.cache_salt else {}
        return params, EngineOptions(prompt=prompt, arguments=arguments)

    def _check(self, params: SamplingParams, request: EngineRequest) -> None:
        if params.n != 1:
            raise ValueError(f"n must be 1 for one sequence, not {params.n}")
        unchecked = [*params._all_stop_token_ids, *request.replay_token_ids]
        for token_ids in params._bad_words_token_ids or ():
            unchecked += token_ids
        if any(not 0 <= token_id < self._vocab_size for token_id in unchecked):
            raise ValueError(
                f"stop tokens, bad words or replayed tokens beyond the vocabulary of {self._vocab_size}"
            )
        if not all(math.isfinite(bias) for bias in (params.logit_bias or {}).values()):
            raise ValueError("logit_bias must be finite numbers")


def _decoded(decoder: msgspec.msgpack.Decoder, data: bytes, what: str) -> Any:
    try:
        return decoder.decode(data)
    except RecursionError as error:
        raise ValueError(f"{what} do not decode: nested too deeply") from error
    # SamplingParams check themselves when they are made, by assertions and type errors too.
    except (msgspec.DecodeError, VLLMClientError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{what} do not decode: {error}") from error


def _lora(lora: tuple[str, int, str]) -> LoRARequest:
    name, adapter_id, path = lora
    if not name or not path or not 0 < adapter_id < 1 << 31:
        raise ValueError(f"an adapter needs a name, a path and a number above 0, not {lora}")
    return LoRARequest(name, adapter_id, path)


def delta_from_output(output: RequestOutput, *, first: bool) -> EngineDelta:
    """What a DELTA output with flat logprobs says; queue and prefill times with the first one only."""
    completion = output.outputs[0]
    stats = output.metrics if first else None
    return EngineDelta(
        token_ids=completion.token_ids,
        logprobs=_rows(completion.logprobs) if completion.logprobs else None,
        prompt_logprobs=_rows(output.prompt_logprobs[1:]) if output.prompt_logprobs else None,
        num_cached_tokens=output.num_cached_tokens if first else None,
        num_cache_creation_tokens=output.num_cache_creation_tokens if first else None,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        kv_params=output.kv_transfer_params,
        queue_s=stats.scheduled_ts - stats.queued_ts if stats else None,
        prefill_s=stats.first_token_ts - stats.scheduled_ts if stats else None,
    )


def _rows(flat: FlatLogprobs) -> LogprobRows:
    sizes = [end - start for start, end in zip(flat.start_indices, flat.end_indices, strict=True)]
    width = max(sizes, default=0)
    token_ids = np.array(flat.token_ids, dtype=np.int32)
    logprobs = np.array(flat.logprobs, dtype=np.float32)
    ranks = np.array(flat.ranks, dtype=np.int32)
    if min(sizes, default=0) < width:
        whole = np.concatenate([_whole_row(flat, row, width) for row in range(len(sizes))])
        token_ids, logprobs, ranks = token_ids[whole], logprobs[whole], ranks[whole]
    shape = (len(sizes), width)
    return LogprobRows(
        token_ids=token_ids.reshape(shape),
        logprobs=logprobs.reshape(shape),
        ranks=ranks.reshape(shape)[:, 0] if sizes else ranks,
    )


def _whole_row(flat: FlatLogprobs, row: int, width: int) -> list[int]:
    """Where a row's entries stand, the sampled token first.

    A reader that lags gets two deltas as one, and vLLM merges their logprobs by way of dicts: a sampled
    token that is also a candidate then stands there once.
    """
    entries = range(flat.start_indices[row], flat.end_indices[row])
    if len(entries) == width:
        return list(entries)
    return [entries[0], *sorted(entries, key=lambda index: flat.ranks[index] or 0)]
